"""Claims about arrays inside a page."""

import base64
import gzip

import numpy as np
import pytest

from experiments.pages.packed import ALIGNED, KINDS, Pack, index_kind


def test_what_is_unpacked_is_what_was_added():
    pack, arrays = Pack(), {}
    for i, kind in enumerate(KINDS):
        arrays[kind] = (np.arange(3 * (i + 1)).reshape(3, i + 1) * 7).astype(kind)
        pack.add(kind, arrays[kind])
    block = gzip.decompress(base64.b64decode(pack.text()))
    for name, array in arrays.items():
        where = pack.directory[name]
        assert where["at"] % ALIGNED == 0
        read = np.frombuffer(block, np.dtype(name).newbyteorder("<"), array.size, where["at"])
        assert read.reshape(where["shape"]).tolist() == array.tolist()
        assert where["kind"] == KINDS[name]
    assert len(block) == pack.size


def test_the_same_arrays_make_the_same_text():
    texts = set()
    for _ in range(2):
        pack = Pack()
        pack.add("a", np.arange(1000, dtype=np.int32))
        texts.add(pack.text())
    assert len(texts) == 1


def test_a_kind_that_no_browser_has_and_a_name_that_is_taken_are_refused():
    pack = Pack()
    pack.add("a", np.zeros(2, np.uint8))
    for name, array in (("b", np.zeros(2)), ("a", np.zeros(2, np.uint8))):
        with pytest.raises(ValueError, match=name):
            pack.add(name, array)


@pytest.mark.parametrize(("largest", "kind"), [(255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "uint32")])
def test_an_index_is_kept_in_as_few_bytes_as_it_needs(largest, kind):
    assert index_kind(largest) == kind
    assert int(np.array(largest).astype(index_kind(largest))) == largest
