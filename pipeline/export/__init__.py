"""Export: a trained model and a dataset -> the latents of every sample, exactly once.

plan.py        what will be written: one task per source shard, and the fingerprint of the work
work.py        one task: rows of a shard -> latents
commit.py      the protocol: stage -> commit record (the only truth) -> publish
statistics.py  exact sums, mergeable in any order
run.py         a worker: its share of the tasks, then what others left
finalize.py    all committed -> statistics, key index, manifest, _SUCCESS
verify.py      is an export what it says it is?

No process talks to another: they meet in the output directory alone, so that any number of them can
start, die and start again.
"""
