"""Data: packed, indexed, ordered and streamed shards.

pack.py, sources/, parts.py      pictures -> shards (`latentmill pack`)
index.py, scan.py, table.py      shards -> what they hold and where (`latentmill index`)
splits.py, order.py              which sample stands where, as pure functions
stream.py, engine.py, board.py   training: one batch per step, by threads
rows.py                          export: one shard from its first row to its last
storage.py, tar.py, decode/      bytes, members, numbers
"""
