import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicache_trt.runtime.block_pool import BlockPool, IntegrityError, OutOfBlocks


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_pool_against_a_set(num_blocks, operations):
    pool = BlockPool(num_blocks, "full")
    owned = []
    for allocating, count in operations:
        if allocating and count > num_blocks - 1 - len(owned):
            with pytest.raises(OutOfBlocks):
                pool.allocate(count)
        elif allocating:
            new = pool.allocate(count)
            assert len(new) == count and 0 not in new and not set(new) & set(owned)
            owned += new
        else:
            pool.free(owned[:count])
            del owned[:count]
        pool.check_integrity()
        assert pool.num_used == len(owned) and pool.num_free == num_blocks - 1 - len(owned)
    pool.free(owned)
    pool.check_integrity()
    assert sorted(pool.allocate(num_blocks - 1)) == list(range(1, num_blocks))


def test_the_block_freed_last_is_allocated_first():
    pool = BlockPool(5, "full")
    blocks = pool.allocate(4)
    pool.free([blocks[2]])
    pool.free([blocks[0]])
    assert pool.allocate(2) == [blocks[0], blocks[2]]


def test_out_of_blocks_says_how_many():
    pool = BlockPool(4, "compressed")
    pool.allocate(1)
    with pytest.raises(OutOfBlocks, match="compressed tier: 3 blocks wanted, 2 of 3 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_misuse_is_reported():
    pool = BlockPool(4, "full")
    with pytest.raises(IntegrityError, match="block 1 freed"):
        pool.free([1])
    with pytest.raises(ValueError, match="num_blocks: expected a positive number, got 0"):
        BlockPool(0, "full")


@pytest.mark.parametrize("block", [0, 1, 3])
def test_check_integrity_finds_wrong_counts(block):
    pool = BlockPool(4, "full")
    pool.allocate(1)
    pool.ref_counts[block] = 0 if block == 1 else 1
    with pytest.raises(IntegrityError, match="full tier: 4 blocks, free list"):
        pool.check_integrity()
