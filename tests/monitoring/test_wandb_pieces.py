"""The reader of W&B's offline files against a file that wandb wrote, whole and cut short."""

import wandb

from pipeline.monitoring.wandb_pieces import BLOCK_BYTES, read_piece, written_steps


def test_a_piece_cut_anywhere_gives_its_whole_records(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(project="p", dir=tmp_path, mode="offline", settings=settings)
    for step in range(150):
        run.log({f"value/{number}": step / 7 for number in range(20)}, step=step)
    run.finish()
    wandb.teardown()  # wandb-core still writes after `finish`

    [path] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    data, whole = path.read_bytes(), [r.SerializeToString() for r in read_piece(path)]
    assert len(data) > 2 * BLOCK_BYTES  # records cross the borders of blocks
    assert written_steps(tmp_path / "wandb") == set(range(150))
    found = []
    for size in range(0, len(data), 997):
        path.write_bytes(data[:size])
        records = [record.SerializeToString() for record in read_piece(path)]
        assert records == whole[: len(records)]
        found.append(len(records))
    assert found == sorted(found)
    assert found[-1] > len(whole) - 20
