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


def test_hashed_blocks_are_found_until_their_space_is_needed():
    pool = BlockPool(4, "full")
    first, second = pool.allocate(2)
    pool.register(first, b"first")
    pool.register(second, b"second")
    pool.free([first, second])
    assert (pool.num_free, pool.num_used, pool.num_evictable) == (3, 0, 2)
    pool.share([pool.find(b"first")])
    assert pool.num_used == 1 and pool.hash_of(first) == b"first"
    assert second not in pool.allocate(1), "free blocks go before evictable ones"
    assert pool.allocate(1) == [second] and pool.num_evictions == 1
    assert pool.find(b"second") is None and pool.hash_of(second) is None
    with pytest.raises(OutOfBlocks, match="1 blocks wanted, 0 of 3 free"):
        pool.allocate(1)
    pool.check_integrity()


def test_a_name_belongs_to_one_block_and_a_block_keeps_its_name():
    pool = BlockPool(4, "full")
    first, second = pool.allocate(2)
    for block, name in ((first, b"a"), (second, b"a"), (first, b"b")):
        pool.register(block, name)
    assert (pool.find(b"a"), pool.find(b"b"), pool.hash_of(second)) == (first, None, None)
    pool.free([first, second])
    pool.check_integrity()
    pool.forget([first, second])
    assert pool.find(b"a") is None and pool.num_evictable == 0 and pool.num_free == 3
    pool.check_integrity()


def test_misuse_of_hashes_is_reported():
    pool = BlockPool(4, "full")
    with pytest.raises(IntegrityError, match="block 1 registered, but it has no owner"):
        pool.register(1, b"a")
    with pytest.raises(IntegrityError, match="block 1 shared, but its contents are gone"):
        pool.share([1])
    (block,) = pool.allocate(1)
    pool.register(block, b"a")
    pool._block_of[b"b"] = block
    with pytest.raises(IntegrityError, match="2 hashes found"):
        pool.check_integrity()


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.lists(st.tuples(st.sampled_from("arsff"), st.integers(0, 9)), max_size=60))
def test_pool_with_hashes_against_a_list_of_names_in_order_of_use(num_blocks, operations):
    """The model: owners of each block, and names from the least to the most recently used."""
    pool, owned, names = BlockPool(num_blocks, "full"), [], {}
    for operation, number in operations:
        idle = [name for name, block in names.items() if block not in owned]
        if operation == "a" and len(set(owned)) < num_blocks - 1:
            (block,) = pool.allocate(1)
            if len(set(owned)) + len(idle) == num_blocks - 1:
                assert names.pop(idle[0]) == block, "the least recently used must go"
            assert block not in owned and block not in names.values()
            owned.append(block)
        elif operation == "r" and owned:
            block, name = owned[number % len(owned)], b"%d" % number
            pool.register(block, name)
            if name not in names and block not in names.values():
                names[name] = block
        elif operation == "s" and names:
            name = list(names)[number % len(names)]
            assert pool.find(name) == names[name]
            pool.share([names[name]])
            owned.append(names[name])
        elif operation == "f" and owned:
            block = owned.pop(number % len(owned))
            pool.free([block])
            for name in [name for name, other in names.items() if other == block]:
                names[name] = names.pop(name)
        pool.check_integrity()
        assert pool.num_used == len(set(owned)) and {name: pool.find(name) for name in names} == names
