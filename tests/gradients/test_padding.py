"""The padding that collation added is found, is not confused with data, and must not matter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracer
from tracer import Tracer
from tracer.gradients.padding import Padding, without

LENGTHS = ([7, 4, 3, 2], [2, 5, 3, 5], [6, 6, 1, 2])


def padded(lengths, value=0, at_end=True, longest=None, seed=0):
    """Return tokens ``[B, T]`` of some lengths, none of which is the padding, and their mask."""
    longest = longest or max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, 30, mask.shape, generator=torch.Generator().manual_seed(seed))
    tokens[:, 1::2] += 30  # no token is repeated
    tokens = tokens.masked_fill(~mask, value)
    return (tokens, mask) if at_end else (tokens.flip(1), mask.flip(1))


def found(batches):
    """Return what is found in the last of some batches."""
    padding = Padding()
    for batch in batches:
        padding.observe(batch, 4)
    return padding.find(batches[-1], 4)


@pytest.mark.parametrize("at_end", [True, False], ids=["at the end", "at the beginning"])
@pytest.mark.parametrize("kept", [True, False], ids=["ones are kept", "ones are padding"])
def test_a_mask_tells_all_padding_from_the_second_batch_on(at_end, kept):
    batches = []
    for lengths in LENGTHS[:2]:
        tokens, mask = padded(lengths, at_end=at_end)
        batches.append({"input_ids": tokens, "mask": mask == kept, "labels": torch.arange(4)})
    (one,) = found(batches)
    assert one.counts.tolist() == [max(LENGTHS[1]) - length for length in LENGTHS[1]]
    assert one.at_end == at_end
    cut = without(batches[1], 4, torch.tensor([2, 1]), [one])  # as long as the longer one
    assert cut["input_ids"].tolist() == batches[1]["input_ids"][[2, 1]].tolist()
    cut = without(batches[1], 4, torch.tensor([0, 2]), [one])
    assert cut["input_ids"].shape == cut["mask"].shape == (2, 3)
    assert cut["labels"].tolist() == [0, 2]


def test_without_a_mask_one_entry_is_left():
    (one,) = found([(padded(lengths)[0], torch.arange(4)) for lengths in LENGTHS])
    assert one.counts.tolist() == [0, 0, 4, 3]


def test_every_sample_may_be_padded():
    batches = []
    for lengths, longest in ((LENGTHS[0], 8), ([7, 9, 4, 3], 16)):
        tokens, mask = padded([longest, *lengths[1:]] if longest == 8 else lengths, longest=longest)
        batches.append({"input_ids": tokens, "attention_mask": mask.long()})
    (one,) = found(batches)
    assert one.counts.tolist() == [9, 7, 12, 13]


def test_sources_and_targets_are_padded_by_themselves():
    batches = []
    for lengths, others in (([7, 4, 3, 2], [3, 8, 8, 5]), ([2, 5, 3, 5], [4, 1, 9, 3])):
        source, mask = padded(lengths)
        batches.append({"input_ids": source, "attention_mask": mask.long(), "labels": padded(others, -100)[0]})
    counts = sorted(each.counts.tolist() for each in found(batches))
    assert counts == [[3, 0, 2, 0], [4, 7, 0, 5]]


def test_a_text_that_ends_with_a_token_twice_is_not_cut():
    batches = [(padded(lengths)[0], torch.arange(4)) for lengths in LENGTHS]
    batches[-1][0][0, -2:] = 11
    (one,) = found(batches)
    assert one.counts.tolist() == [0, 0, 4, 3]


@pytest.mark.parametrize("masked", [True, False])
def test_repeated_tokens_are_no_padding(masked):
    batches = []
    for lengths in LENGTHS:
        tokens, mask = padded(lengths, at_end=False)
        tokens[:, -3:] = 11 + torch.arange(4)[:, None]
        batches.append({"input_ids": tokens, "attention_mask": mask.long()} if masked else (tokens, torch.arange(4)))
    assert all(not each.at_end for each in found(batches))


def test_dark_margins_of_images_of_several_sizes_are_no_padding():
    batches = []
    for size in (8, 10, 12):
        images = torch.zeros(4, 1, size, size)
        images[:, :, 2:-2, 2:-3] = torch.rand(4, 1, size - 4, size - 5)
        batches.append((images, torch.arange(4)))
    assert not found(batches)


def test_sizes_that_do_not_change_are_no_padding():
    batches = [
        {"input_ids": padded(lengths, longest=8)[0], "mask": padded(lengths, longest=8)[1]} for lengths in LENGTHS
    ]
    assert not found(batches)


def sides(lengths, others, seed=0):
    """Return tokens padded to one length, and labels of another one that are not padded and end with one token."""
    tokens, mask = padded(lengths, seed=seed)
    labels = torch.randint(3, 30, (len(lengths), others), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels.index_fill(1, torch.tensor(-1), 2)}


def test_tensors_that_were_of_different_sizes_are_not_cut_together():
    (one,) = found([sides([7, 4, 3, 2], 5), sides([3, 1, 3, 2], 3)])
    assert {path for path, _ in one.dimensions} == {"batch['input_ids']", "batch['attention_mask']"}
    assert one.counts.tolist() == [0, 2, 0, 1]


class ReadsAndWrites(nn.Module):
    """Logits of labels of any number from masked tokens."""

    def __init__(self):
        super().__init__()
        self.embedding, self.places, self.head = nn.Embedding(60, 4), nn.Embedding(8, 4), nn.Linear(4, 60)

    def forward(self, input_ids, attention_mask, count):
        x = (self.embedding(input_ids) * attention_mask[..., None]).sum(1, keepdim=True)
        return self.head(torch.tanh(x + self.places.weight[:count]))


def labels_loss(model, batch):
    logits = model(batch["input_ids"], batch["attention_mask"], batch["labels"].shape[1])
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)


def test_labels_that_have_the_size_of_padded_tokens_by_chance_stay_whole(tmp_path):
    model = ReadsAndWrites().double()
    traced = Tracer(model, labels_loss, 12, tmp_path / "store", projector="none", storage="float32")
    traced.load_checkpoint(model.state_dict(), model_id=0)
    for start, lengths in zip(range(0, 12, 4), LENGTHS, strict=True):
        batch = sides(lengths, max(lengths), seed=start)
        assert all(set(each.dimensions) > set(each.evident) for each in found([sides(LENGTHS[1], 5), batch]))
        traced.featurize(batch, inds=torch.arange(start, start + 4))  # an audit that cut labels too would raise
    traced.finalize_features()


def test_a_few_texts_that_begin_with_a_token_twice_are_not_padded_however_often_they_come():
    batches = []
    for lengths in LENGTHS * 4:
        tokens = torch.arange(4)[:, None] * max(lengths) + torch.arange(max(lengths)) + 3
        tokens[1, :2] = 5
        batches.append((tokens, torch.arange(4)))
    assert not found(batches)


def test_a_token_that_texts_have_inside_is_no_padding():
    batches = []
    for seed, lengths in enumerate(LENGTHS):
        tokens = padded([max(lengths)] * 4, seed=seed)[0]
        tokens[:, :2], tokens[:, -2] = 5, 5
        tokens[0, :2] = torch.tensor([6, 5])
        batches.append((tokens, torch.arange(4)))
    assert not found(batches)


class Reads(nn.Module):
    """A classifier of the tokens that a mask keeps, whose convolution reads some positions beyond them."""

    def __init__(self, beyond, scale=1.0):
        super().__init__()
        self.embedding, self.beyond, self.scale = nn.Embedding(60, 4), beyond, scale
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids, mask):
        x = self.embedding(input_ids)
        x = x + self.scale * F.pad(x, (0, 0, 0, self.beyond))[:, self.beyond :]
        return self.head((torch.tanh(x) * mask[..., None]).sum(1))


def loss(model, batch):
    return F.cross_entropy(model(batch["input_ids"], batch["mask"]), batch["labels"], reduction="none")


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1.0), (torch.float64, 1e-3), (torch.float32, 1.0)])
def test_positions_beyond_the_mask_that_matter_are_refused(tmp_path, dtype, scale):
    torch.manual_seed(0)
    run(Reads(0, scale).to(dtype), tmp_path / "right")
    with pytest.raises(tracer.GradientError, match="padding of sample"):
        run(Reads(1, scale).to(dtype), tmp_path / "wrong")


def run(model, folder):
    traced = Tracer(model, loss, 12, folder, projector="none", storage="float32")
    traced.load_checkpoint(model.state_dict(), model_id=0)
    for start, lengths in zip(range(0, 12, 4), LENGTHS, strict=True):
        tokens, mask = padded(lengths, seed=start)
        batch = {"input_ids": tokens, "mask": mask, "labels": torch.arange(4) % 3}
        traced.featurize(batch, inds=torch.arange(start, start + 4))
    traced.finalize_features()
