"""Claims about the text that is traced: every window is where the text has it."""

import numpy as np
import pytest

from moe.analysis.windows import of_corpus, of_ids, of_text
from moe.config.data import TokenizerConfig
from moe.data.prepare import prepare
from moe.data.tokenizer import train
from moe.errors import BadInput
from tests.small_runs import settings, silent

BYTES = train(TokenizerConfig("byte"), [])


def _ids(tmp_path, ids, dtype=np.int32):
    path = tmp_path / "ids.npy"
    np.save(path, np.array(ids, dtype))
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_ids_are_read_in_order_with_the_next_one_behind_each(tmp_path, dtype, batch_size):
    ids = np.random.default_rng(0).integers(0, 50, 101)
    windows = of_ids(_ids(tmp_path, ids, dtype), 50, 8, batch_size, 0)
    batches = list(windows)
    read = np.concatenate([batch[0] for batch in batches])
    assert read[:, :-1].ravel().tolist() == ids[:96].tolist()
    assert read[:, 1:].ravel().tolist() == ids[1:97].tolist()
    assert np.concatenate([batch[3] for batch in batches]).ravel().tolist() == list(range(96))
    assert all((batch[2] == 0).all() and (batch[1] == 0).all() for batch in batches)
    again = [batch[0].tolist() for batch in windows]
    assert again == [batch[0].tolist() for batch in batches], "the same ones every time"


def test_a_text_is_its_tokenizers_ids(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question")
    windows = of_text(tmp_path / "a.txt", BYTES, 8, 2, 16)
    assert [len(batch[0]) for batch in windows] == [2]
    (batch,) = windows
    assert batch[0][:, :-1].ravel().tolist() == BYTES.encode("to be or not to be")[:16]


def test_windows_of_a_corpus_are_spread_over_it(corpus):
    cfg = settings(corpus, "unused")
    dataset = prepare(cfg.data, cfg.tokenizer, silent)
    windows = of_corpus(dataset, 32, 2, 320)
    assert len(windows.starts) == 10
    split = dataset.split("val")
    for batch, starts in zip(windows, np.array_split(windows.starts, 5), strict=True):
        tokens, domains = split.read(starts, 32)
        assert (batch[0] == tokens).all()
        assert (batch[1] == domains).all()
    assert len(of_corpus(dataset, 32, 2, 0).starts) == split.n_windows(32)


def test_as_many_windows_at_a_time_as_have_1024_tokens(tmp_path):
    windows = of_ids(_ids(tmp_path, np.zeros(8193)), 1, 512, 0, 0)
    assert [len(batch[0]) for batch in windows] == [2] * 8
    assert [len(batch[0]) for batch in of_ids(_ids(tmp_path, np.zeros(8193)), 1, 4096, 0, 0)] == [1, 1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (np.zeros((3, 3), int), r"holds int64 \(3, 3\): accepted are token ids"),
        (np.zeros(30), r"holds float64 \(30,\)"),
        (np.array([1, 2, -1] + [0] * 30), "has id -1 at 2: the model's are 0 to 9"),
        (np.array([0] * 30 + [10]), "has id 10 at 30"),
        (np.array([1, 2, 3]), "has 3 tokens, and one window takes 9"),
        (np.array([{"a": 1}]), r"holds object \(1,\)"),
        (b"nonsense", "is no whole .npy file"),
        (None, "cannot be read .No such file"),
    ],
)
def test_what_is_no_array_of_ids_is_refused(tmp_path, content, sentence):
    path = tmp_path / "ids.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(BadInput, match=sentence):
        of_ids(path, 10, 8, 0, 0)


def test_ids_that_were_cut_short_are_refused(tmp_path):
    path = _ids(tmp_path, range(40))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BadInput, match="has not the bytes of 40 ids"):
        of_ids(path, 50, 8, 0, 0)
