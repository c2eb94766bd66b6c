"""A trained model and a dataset -> the latents of every sample, exactly once.

__main__.py    the command line, for any number of processes; command.py: what it does
prepare.py     config -> model, data, device -> encoder and plan
plan.py        what will be written: one task per source shard, and the fingerprint of the work
workers.py     which worker this process is, and which tasks it takes in which order
run.py         a worker: its share of the tasks, then what others left
work.py        one task: rows of a shard -> latents; passthrough.py: labels and columns from JSON
statistics.py  exact sums, mergeable in any order
commit.py      the protocol: stage -> commit record (the only truth) -> publish
failures.py    attempts that failed by a task's own fault, and when that is enough
layout.py      where everything lies; progress.py: the line on stderr
finalize.py    all committed -> statistics, key index, manifest (manifest.py), _SUCCESS
status.py      how far an export is, finishing and cleaning up, from the files alone
verify/        whether an export is what it says it is; audit.py, source.py and reencode.py: the
               files' content, the source shards, the model

No process talks to another: they meet in the place of the export alone, a directory or an s3://
URL, so that any number of them can start, die and start again.
"""
