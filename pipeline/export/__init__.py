"""Exports: a trained model and a data set -> the latents of every sample, exactly once.

__main__.py    the command line, for any number of processes; command.py: what it does
prepare.py     config -> model, data, device -> encoder and plan
plan.py        what will be written: one task per source shard, and the fingerprint of the work
adopt.py       stores the plan, or compares it with the stored one
workers.py     number of this worker, and its queue of tasks
run.py         a worker: its share of the tasks, then those that others have not done
work.py        one task: rows of a shard -> latents; passthrough.py: labels and columns from JSON
statistics.py  exact sums, mergeable in any order
commit.py      the protocol: stage -> commit record (decides what is done) -> publish
failures.py    records of failed attempts, and when a task counts as failed
layout.py      names of all files; progress.py: the line on stderr
finalize.py    all committed -> statistics, key index, manifest (manifest.py), _SUCCESS
status.py      progress, finishing and cleaning up, from the files alone
verify/        checks of an export; audit.py, source.py and reencode.py: content of the files,
               source shards, model

Processes do not communicate: they share only the files of the export, in a directory or at an
s3:// URL. So any number of them can start, die and start again.
"""
