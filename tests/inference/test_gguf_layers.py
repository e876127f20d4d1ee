from pathlib import Path

import pytest

from piclusterd.errors import UserError
from piclusterd.inference.gguf_layers import read_layers

from .rig import DEMO


def test_layers_have_the_bytes_of_their_tensors_and_nothing_is_left_over() -> None:
    layers = read_layers(DEMO)
    assert len(layers.each) == 4
    assert len(set(layers.each)) == 1
    data = sum(layers.each) + layers.rest
    head = DEMO.stat().st_size - data
    assert 0 < head < 100_000  # its keys: the vocabulary, a chat template


@pytest.mark.parametrize("length", [0, 10, 24, 300, 20_000, 200_000])
def test_a_file_cut_short_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(DEMO.read_bytes()[:length])
    with pytest.raises(UserError, match=r"the layers of .*cut.gguf cannot be told"):
        read_layers(path)


def test_absurd_counts_are_refused_before_they_are_believed(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    data = bytearray(DEMO.read_bytes())
    data[8:16] = (2**40).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match="claims 1099511627776 tensors"):
        read_layers(path)


def test_a_layer_that_is_missing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "gap.gguf"
    path.write_bytes(DEMO.read_bytes().replace(b"blk.1.", b"blk.9."))
    with pytest.raises(UserError, match="not numbered through"):
        read_layers(path)
