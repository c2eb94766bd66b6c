"""Slabs: memory is used again, and all of it together stays within what was in use at once."""

from pipeline.data.stream.read_buffers import ReadBufferPool, rounded_size

KIB = 1 << 10


def test_a_freed_slab_serves_the_next_read_of_its_size():
    pool = ReadBufferPool()
    first = pool.take(100 * KIB)
    memory = first.memory
    assert pool.take(100 * KIB).memory is not memory  # it is still in use
    del first
    assert pool.take(99 * KIB).memory is memory


def test_sizes_are_rounded_up_by_at_most_an_eighth():
    for num_bytes in (*range(32 * KIB, 70 * KIB, 777), 10**6, 10**9 + 1):
        assert num_bytes <= rounded_size(num_bytes) <= num_bytes * 9 / 8 + 1
    assert rounded_size(0) == rounded_size(1) == rounded_size(4 * KIB) == 4 * KIB


def test_free_slabs_of_other_sizes_give_way():
    pool = ReadBufferPool()
    held = [pool.take(1000 * KIB) for _ in range(10)]
    most = sum(len(slab.memory) for slab in held)
    held.clear()
    held = [pool.take(500 * KIB) for _ in range(20)]
    free = sum(size * len(memories) for size, memories in pool._free.items())
    assert free + sum(len(slab.memory) for slab in held) <= max(most, len(held[0].memory) * 20)


def test_a_somewhat_larger_free_slab_serves_a_read():
    pool = ReadBufferPool()
    memory = pool.take(1000 * KIB).memory
    assert pool.take(700 * KIB).memory is memory
    assert pool.take(500 * KIB).memory is not memory  # it would waste half
