import pytest
import torch

from kvstore_client import InvalidArgument, ModelShape
from kvstore_client.frames import FRAME_BYTES, block_of, part_frames, raw_frames
from kvstore_proto.v1 import kvstore_pb2 as pb

from .inputs import SHAPE, block


def test_frames_go_layer_by_layer_keys_first_and_hold_every_row_once():
    k, v = block(5)
    frames = list(raw_frames(block_of(k, v, SHAPE)))
    assert [(f.head.layer, f.head.kind) for f in frames] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [bytes(f.data) for f in frames] == [t.numpy().tobytes() for t in (k[0], v[0], k[1], v[1])]
    assert {(f.head.part, f.head.token_offset, f.head.tokens, f.head.heads) for f in frames} == {
        (pb.PART_ROWS, 0, 5, 2)
    }


def test_a_part_is_cut_between_tokens_at_about_two_mebibytes():
    tokens = 3 * FRAME_BYTES // 384 + 1
    rows = torch.arange(tokens * 192, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(tokens, 3, 64)
    frames = list(part_frames(4, "values", pb.PART_ROWS, rows, token_offset=7))
    assert max(f.data.nbytes for f in frames) <= FRAME_BYTES
    assert len(frames) == 4
    assert [f.head.token_offset for f in frames] == [7, *(7 + i * (FRAME_BYTES // 384) for i in (1, 2, 3))]
    assert sum(f.head.tokens for f in frames) == tokens
    assert b"".join(f.data for f in frames) == rows.numpy().tobytes()


def test_a_token_larger_than_a_frame_still_goes_alone():
    rows = torch.zeros(2, 3 * FRAME_BYTES // 4)
    assert [f.head.tokens for f in part_frames(0, "keys", pb.PART_WORDS, rows)] == [1, 1]


def test_an_empty_part_has_no_frame():
    assert list(part_frames(0, "keys", pb.PART_ROWS, torch.zeros(0, 2, 32))) == []
    assert list(part_frames(0, "keys", pb.PART_WORDS, torch.zeros(3, 0))) == []


def test_layers_may_come_one_by_one_and_as_views():
    k, v = block(4)
    cache = k.transpose(1, 2).contiguous().transpose(1, 2)
    for form in (list(k), tuple(cache)):
        frames = raw_frames(block_of(form, v, SHAPE))
        assert bytes(next(frames).data) == k[0].numpy().tobytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda k, v: (k[:1], v), "k: has 1 layers, the session 2"),
        (lambda k, v: (k, v[:, :3]), "v: has 3 tokens, k has 4"),
        (lambda k, v: (k[..., :16], v), r"k: layer 0 has shape \[4, 2, 16\] instead of \[4, 2, 32\]"),
        (lambda k, v: (k, v.transpose(1, 2)), r"v: layer 0 has shape \[2, 4, 32\]"),
        (lambda k, v: (k.bfloat16(), v), r"k: layer 0 has dtype torch.bfloat16, the session torch.float16"),
        (lambda k, v: ([k[0], k[1, :3]], v), r"k: layer 1 has shape \[3, 2, 32\]"),
        (lambda k, v: (k[0], v), "k: has 4 layers"),
        (lambda k, v: ([], v), "k: has 0 layers"),
    ],
)
def test_what_does_not_fit_the_session_is_refused_by_name(change, text: str):  # type: ignore[no-untyped-def]
    k, v = change(*block(4))
    with pytest.raises(InvalidArgument, match=text) as caught:
        block_of(k, v, SHAPE)
    assert caught.value.facts["field"] == text[0]


def test_a_three_dimensional_tensor_is_one_layer_for_each_first_index():
    shape = ModelShape(layers=3, kv_heads=1, query_heads=1, head_dim=32, dtype="float32", sm_scale=1)
    with pytest.raises(InvalidArgument, match="layer 0 has shape"):
        block_of(torch.zeros(3, 4, 32), torch.zeros(3, 4, 32), shape)
