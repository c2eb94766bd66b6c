"""Data: packed, indexed, ordered and streamed shards.

pack/             images -> shards (`latentmill pack`)
index/            shards -> what they hold and where (`latentmill index`, `verify`)
order/            which sample fills which slot, as pure functions
stream/           training: one batch per step, by threads
sequential.py     export: each shard from its first row to its last
ordered_shards.py, raw_samples.py   the order of training as a stage of webdataset's pipelines
storage/          bytes, from any store
decode/, augmentations/   bytes -> numbers
"""
