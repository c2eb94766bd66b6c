"""Data: packed, indexed, ordered and streamed shards.

pack/            pictures -> shards (`latentmill pack`)
index/           shards -> what they hold and where (`latentmill index`, `verify`)
order/           which sample stands where, as pure functions
stream/          training: one batch per step, by threads
rows.py          export: one shard from its first row to its last
raw.py, wds.py   our order as a stage of webdataset's own pipelines
storage/         bytes, from any store
decode/, augmentations/   bytes -> numbers
"""
