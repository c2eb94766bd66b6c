"""Doctor's checks of the data: indexes, splits, members, shards, order."""

from contextlib import closing, suppress
from pathlib import Path

from pipeline.commands.doctor.finding import (
    NUM_SHOWN,
    CheckedSettings,
    DoctorContext,
    Finding,
    Findings,
    some,
)
from pipeline.common.console import plural
from pipeline.common.errors import UserError
from pipeline.data.index import Index
from pipeline.data.index.left_out import remedy_of_repeats
from pipeline.data.index.manifest import table_path, without_query
from pipeline.data.index.splits import ALL
from pipeline.data.order.mixture import read_amplification
from pipeline.data.order.simulate import lanes_that_read_once
from pipeline.data.settings import DataSource
from pipeline.data.storage import is_url, open_storage
from pipeline.data.storage.opening import local_path
from pipeline.data.stream.stream import MAX_READ_AMPLIFICATION
from pipeline.training.build import max_missing
from pipeline.training.sense import doubts


def check_index(context: DoctorContext) -> Findings:
    """Samples, splits and members of the indexes; duplicate keys and damaged shards."""
    for source, index in context.indexes:
        shape = f"{index.num_samples:,} samples in {len(index.shards):,} shards"
        yield Finding("index", "ok", f"{source.path}: {shape}")
        if index.num_duplicate_keys:
            key, *shards = index.duplicate_keys[0]
            repeats = plural(index.num_duplicate_keys, "sample")
            yield Finding(
                "index",
                "warning",
                f"{source.path}: {repeats} with the key of an earlier one, such as "
                f"{key!r} in {', '.join(list(dict.fromkeys(shards))[:NUM_SHOWN])}: "
                f"{remedy_of_repeats(index.duplicate_keys)}",
            )
        if index.damage:
            shard, damage = index.damage[0]
            yield Finding(
                "index",
                "warning",
                f"{source.path}: the shards were damaged when indexed ({len(index.damage)} times, "
                f"such as {shard}: {damage.text}): the lost samples are left out; pack again",
            )
        losses = index.left_out_lines(only_losses=True)
        for line in index.left_out_lines():
            yield Finding("index", "warning" if line in losses else "ok", f"{source.path}: {line}")
        yield from _check_splits(context.settings, index)
        yield from _check_members(context, source, index)


def _check_splits(settings: CheckedSettings, index: Index) -> Findings:
    splits = {"data.split": settings.data.split}
    if not settings.evaluation.own:
        splits["evaluation.split"] = settings.evaluation.split
    for setting, split in splits.items():
        try:
            count = int(index.counts(split, setting).sum())
        except UserError as error:
            yield Finding("split", "FAIL", str(error))
            continue
        again = f"give it a larger fraction by `latentmill index {index.path} --split ...`"
        verdict, remedy = ("ok", "") if count else ("FAIL", f": name another split, or {again}")
        yield Finding("split", verdict, f"{setting} {split}: {count:,} samples{remedy}")


def _check_members(context: DoctorContext, source: DataSource, index: Index) -> Findings:
    """Too few samples with a wanted member end the run at its start."""
    data = context.settings.data
    wanted = ", ".join(data.decode.member_suffixes)
    split, allowed = ALL, data.max_bad_fraction
    with suppress(UserError):  # of an unknown split, which `_check_splits` reports
        index.splits.check(data.split)
        split = data.split
        if context.config is not None:
            allowed = max_missing(context.config, source, index)
    try:
        index.check_suffixes(data.decode.member_suffixes, allowed, split=split)
        yield Finding("members", "ok", f"{index.path} has members with a suffix of {wanted}")
    except UserError as error:
        yield Finding("members", "FAIL", str(error))


def check_sense(context: DoctorContext) -> Findings:
    """Valid settings that are likely mistakes; without an index, only those of the config."""
    if context.config is None:
        return
    complete = len(context.indexes) == len(context.settings.data.sources)
    indexes = [index for _, index in context.indexes] if complete else []
    try:
        for what, text in doubts(context.config, indexes, context.world):
            yield Finding(what, "warning", text)
    except UserError:  # an unknown split, which `check_index` reports
        return


def check_shards(context: DoctorContext) -> Findings:
    """Every shard exists and is as indexed; lists those that are not."""
    for source, index in context.indexes:
        with closing(open_storage(source.root, context.remote)) as storage:
            states = storage.states(shard.name for shard in index.shards)
            where = {shard.name: storage.where(shard.name) for shard in index.shards}
        missing: list[str] = []
        changed: list[str] = []
        for number, shard in enumerate(index.shards):
            state, expected = states[shard.name], index.expected_state(number, source.root)
            if state is None:
                missing.append(where[shard.name])
            elif state.num_bytes != expected.num_bytes or (
                None not in (state.tag, expected.tag) and state.tag != expected.tag
            ):
                changed.append(where[shard.name])
        again = (
            f"run `latentmill index {without_query(source.root)}` (that makes it another data set)"
        )
        if missing:
            yield Finding("shards", "FAIL", f"{some(missing)} missing: put them back, or {again}")
        if changed:
            yield Finding("shards", "FAIL", f"{some(changed)} changed since indexed: {again}")
        if not missing and not changed:
            yield from _check_stamps(source, index)


def _check_stamps(source: DataSource, index: Index) -> Findings:
    """Warn of local shards whose modification time differs from that of their table."""
    if isinstance(index.path, Path) and not is_url(source.root):
        touched = [
            shard.name
            for shard in index.shards
            if (Path(local_path(source.root)) / shard.name).stat().st_mtime_ns
            != table_path(index.path, shard.name).stat().st_mtime_ns
        ]
        if touched:
            yield Finding(
                "shards",
                "warning",
                f"{some(touched)} written or copied since indexed, of the same size: "
                f"`latentmill verify {source.path}` compares the content",
            )
            return
    yield Finding(
        "shards", "ok", f"{without_query(source.root)}: {len(index.shards):,} there and unchanged"
    )


def check_order(context: DoctorContext) -> Findings:
    """Lanes, interleave and window; how often the processes read each byte."""
    if context.order is None:
        return
    size, world = context.settings.batch_size, context.world
    for order in context.order.orders:
        text = (
            f"{order.num_samples:,} samples per epoch, {order.lanes} lanes, interleave "
            f"{order.interleave}, window {order.window_size}"
        )
        amplification = read_amplification(order.lanes, world)
        if amplification > MAX_READ_AMPLIFICATION:
            fitting = ", ".join(map(str, lanes_that_read_once(size, world)[:8])) or "none here"
            yield Finding(
                "order",
                "warning",
                f"{text}: {world} processes read every byte {amplification:.2f} times; multiples "
                f"of {world} that divide the batch read it once: data.lanes of {fitting}",
            )
        else:
            yield Finding("order", "ok", f"{text}; every byte read {amplification:.2f} times")
