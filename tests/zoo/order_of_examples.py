"""Models that sort, group, deduplicate, unpad or couple the examples of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from zoo.harness import Entry
from zoo.tables import Net, integers, kept, labels, normal, sequences, vectors

COUPLED = "influence each other|depends on which samples share a batch|alone"


def two_layers(function, width: int = 3, hidden: int = 5):
    """Return a builder of a net with a layer ``h`` and a head ``o``."""
    return lambda: Net(function, h=nn.Linear(width, hidden), o=nn.Linear(hidden, 3))


def sort_by_length(m, x, count):
    order = count.argsort(descending=True, stable=True)
    return m.o((torch.tanh(m.h(x[order])) * kept(x, count[order])).sum(1))[order.argsort()]


def unpad(m, x, count):
    mask = kept(x, count)[..., 0]
    h = torch.tanh(m.h(x[mask]))
    return m.o(h.new_zeros(len(x), h.shape[1]).index_add(0, mask.nonzero()[:, 0], h))


def group_by_kind(m, x, kind):
    order = kind.argsort(stable=True)
    return m.o(torch.tanh(m.h(x[order])))[order.argsort()]


def deduplicate(m, x):
    unique, index = torch.unique(x, dim=0, return_inverse=True)
    return m.o(torch.tanh(m.h(unique)))[index]


def repeated_examples():
    x = normal(3)
    x[7], x[9], x[12] = x[5], x[5], x[11]
    return x, labels()


def kinds(first=(0, 0, 0, 0), num_kinds: int = 2):
    def batch():
        return normal(3), torch.cat([torch.tensor(first), integers(num_kinds)[len(first) :]]), labels()

    return batch


def branches(m, x, kind):
    out = x.new_zeros(len(x), 3)
    for number, layer in enumerate(m.layers):
        chosen = kind == number
        if chosen.any():
            out = out.index_put((chosen.nonzero()[:, 0],), layer(x[chosen]))
    return out


def reversed_inside(m, x):
    return m.o(torch.tanh(m.h(x.flip(0)))).flip(0)


def permuted_when_large(m, x):
    order = torch.arange(len(x)).roll(int(len(x) > 4))
    return m.o(torch.tanh(m.h(x[order])))[order.argsort()]


def positives_only(m, x):
    chosen = x[:, 0] > 0
    h = torch.tanh(m.h(x))
    return h[:, :3].index_add(0, chosen.nonzero()[:, 0], m.o(h[chosen]))


def interleaved(m, x, kind):
    return torch.stack([m.h(x), m.h(-x)], 1).flatten(0, 1).tanh().unflatten(0, (len(x), 2)).sum(1) @ m.o.weight.T


def packed(cell, **options):
    def build():
        def forward(m, x, count):
            sequence = pack_padded_sequence(x, count, batch_first=True, enforce_sorted=False)
            outputs, _ = pad_packed_sequence(m.rnn(sequence)[0], batch_first=True, total_length=x.shape[1])
            return m.o(outputs.sum(1))

        rnn = cell(3, 4, batch_first=True, **options)
        return Net(forward, rnn=rnn, o=nn.Linear(4 * (1 + rnn.bidirectional), 3))

    return build


def packed_data_in_a_layer(m, x, count):
    sequence = pack_padded_sequence(x, count, batch_first=True, enforce_sorted=False)
    h = sequence._replace(data=torch.tanh(m.h(sequence.data)))
    return m.o(pad_packed_sequence(h, batch_first=True)[0].sum(1))


def last_state(cell, **options):
    def build():
        def forward(m, x, count):
            states = m.rnn(pack_padded_sequence(x, count, batch_first=True, enforce_sorted=False))[1]
            return m.o((states[0] if isinstance(states, tuple) else states)[-1])

        return Net(forward, rnn=cell(3, 4, batch_first=True, **options), o=nn.Linear(4, 3))

    return build


def bucketed(m, x, count):
    parts, places = [], []
    for length in count.unique().tolist():
        chosen = (count == length).nonzero()[:, 0]
        parts.append(m.o(torch.tanh(m.h(x[chosen, :length])).sum(1)))
        places.append(chosen)
    return torch.cat(parts)[torch.cat(places).argsort()]


def split_and_padded_again(m, x, count):
    rows = torch.cat([row[:length] for row, length in zip(x, count.tolist(), strict=True)])
    h = torch.tanh(m.h(rows)).split(count.tolist())
    return m.o(pad_sequence(h, batch_first=True).sum(1))


def cells(m, x, count):
    state = x.new_zeros(len(x), 4)
    for step in range(x.shape[1]):
        alive = count > step
        state = torch.where(alive[:, None], m.cell(x[:, step], state), state)
    return m.o(state)


def shrinking_batch(m, x, count):
    order = count.argsort(descending=True, stable=True)
    x, count = x[order], count[order]
    state = x.new_zeros(len(x), 4)
    for step in range(int(count.max())):
        alive = int((count > step).sum())
        state = torch.cat([m.cell(x[:alive, step], state[:alive]), state[alive:]])
    return m.o(state)[order.argsort()]


def top_expert(m, x):
    gate = m.gate(x).softmax(1)
    weight, expert = gate.max(1)
    out = x.new_zeros(len(x), 3)
    for number, layer in enumerate(m.experts):
        rows = (expert == number).nonzero()[:, 0]
        out = out.index_add(0, rows, weight[rows, None] * layer(x[rows]))
    return out


def two_experts_a_token(m, x):
    flat = x.flatten(0, 1)
    weight, expert = m.gate(flat).softmax(1).topk(2)
    order = expert.flatten().argsort(stable=True)
    token = order // 2
    groups = torch.bincount(expert.flatten(), minlength=len(m.experts)).tolist()
    parts = [layer(rows) for layer, rows in zip(m.experts, flat[token].split(groups), strict=True)]
    out = flat.new_zeros(len(flat), 3).index_add(0, token, torch.cat(parts) * weight.flatten()[order, None])
    return out.unflatten(0, x.shape[:2]).sum(1)


def grouped_weights(m, x):
    expert = m.gate(x).argmax(1)
    return torch.einsum("bi,bio->bo", x, m.weights[expert])


def capacity(m, x):
    """Drop whatever an expert gets beyond two examples, so that places in the batch matter."""
    score = m.gate(x).softmax(1)
    expert = score.argmax(1)
    place = F.one_hot(expert, 2).cumsum(0).gather(1, expert[:, None])[:, 0]
    hidden = torch.stack([layer(x) for layer in m.experts], 1)[torch.arange(len(x)), expert]
    return hidden * (place <= 1)[:, None] * score.amax(1, keepdim=True)


def experts(function, width: int = 3, count: int = 3):
    def build():
        layers = nn.ModuleList(nn.Linear(width, 3) for _ in range(count))
        return Net(function, gate=nn.Linear(width, count), experts=layers)

    return build


def attention_of_concatenated(m, x, count):
    flat, number = x[kept(x, count)[..., 0]], torch.repeat_interleave(torch.arange(len(x)), count)
    scores = (m.h(flat) @ m.h(flat).mT).masked_fill(number[:, None] != number, -torch.inf)
    mixed = scores.softmax(1) @ torch.tanh(m.h(flat))
    return m.o(mixed.new_zeros(len(x), 5).index_add(0, number, mixed))


def chosen_by_experts(m, x):
    score = m.gate(x).softmax(1)
    out = score @ score.new_ones(len(m.experts), 3)
    for number, layer in enumerate(m.experts):
        rows = score[:, number].topk((len(x) + 1) // 2).indices
        out = out.index_add(0, rows, layer(x[rows]))
    return out


def layers_of_distinct_values(m, x):
    distinct, index = x.round().unique(return_inverse=True)
    return m.o(torch.tanh(m.h(distinct[:, None]))[index].sum(1))


def batch_norm_without_statistics():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 3))


def positives_of_the_batch(model, batch):
    logit = model(batch[0])[:, 0]
    positive = (batch[1] == 1).to(logit)
    return F.binary_cross_entropy_with_logits(logit, positive, reduction="none") / positive.sum().clamp(min=1)


def innocent_labels():
    return normal(3), torch.cat([torch.zeros(4, dtype=torch.int64), labels()[4:]])


def functional_in_later_batches(m, x):
    h = m.h(x)
    far = x[:, :1] > 2
    return m.o(torch.where(far, F.linear(torch.tanh(h), m.h.weight @ m.h.weight.T), h) if far.any() else h)


def far_later():
    x = normal(3).clamp(max=1)
    x[6:, 0] += 3
    return x, labels()


def rank_of_examples(m, x):
    return m.o(torch.tanh(m.h(x)) * (1 + 0.1 * x[:, :1].argsort(0).argsort(0)))


def row_before(m, x):
    return m.o(torch.tanh(m.h(x + F.pad(x, (0, 0, 1, 0))[:-1])))


def mean_over_longest(m, x, count):
    longest = int(count.max())
    return m.o((torch.tanh(m.h(x[:, :longest])) * kept(x, count)[:, :longest]).mean(1))


SORTED, MIXED = sequences(), sequences(first=(2, 6, 3, 5))
FULL = sequences(first=(4, 4, 4, 4), longest=6)

ORDER_OF_EXAMPLES = [
    Entry("sorts by length, first batch sorted", two_layers(sort_by_length), SORTED),
    Entry("sorts by length", two_layers(sort_by_length), MIXED),
    Entry("drops padding, first batch even", two_layers(unpad), FULL),
    Entry("drops padding", two_layers(unpad), MIXED),
    Entry("groups by kind, one kind first", two_layers(group_by_kind), kinds()),
    Entry("groups by kind", two_layers(group_by_kind), kinds(first=(1, 0, 1, 0))),
    Entry("deduplicates, later only", two_layers(deduplicate), repeated_examples),
    Entry(
        "a branch for each kind, one kind first",
        lambda: Net(branches, layers=nn.ModuleList(nn.Linear(3, 3) for _ in range(2))),
        kinds(),
    ),
    Entry("reversed inside", two_layers(reversed_inside), vectors(3)),
    Entry("rolled when the batch is large", two_layers(permuted_when_large), vectors(3)),
    Entry("some examples skip the head", two_layers(positives_only), vectors(3)),
    Entry("views interleaved", two_layers(interleaved), kinds()),
    Entry("buckets of equal length", two_layers(bucketed), MIXED),
    Entry("concatenated and padded again", two_layers(split_and_padded_again), MIXED),
    Entry("packed GRU, sorted first", packed(nn.GRU), SORTED),
    Entry("packed LSTM", packed(nn.LSTM), MIXED),
    Entry("packed bidirectional LSTM of two layers", packed(nn.LSTM, bidirectional=True, num_layers=2), MIXED),
    Entry(
        "packed LSTM with projection",
        lambda: Net(
            lambda m, x, count: m.o(
                pad_packed_sequence(
                    m.rnn(pack_padded_sequence(x, count, batch_first=True, enforce_sorted=False))[0], batch_first=True
                )[0].sum(1)
            ),
            rnn=nn.LSTM(3, 4, batch_first=True, proj_size=2),
            o=nn.Linear(2, 3),
        ),
        MIXED,
    ),
    Entry("last state of a packed GRU", last_state(nn.GRU), SORTED),
    Entry("last state of a packed LSTM", last_state(nn.LSTM), MIXED),
    Entry("packed data in a layer, sorted first", two_layers(packed_data_in_a_layer), SORTED),
    Entry("GRU cell with a mask", lambda: Net(cells, cell=nn.GRUCell(3, 4), o=nn.Linear(4, 3)), MIXED),
    Entry(
        "batch that shrinks, sorted first",
        lambda: Net(shrinking_batch, cell=nn.RNNCell(3, 4), o=nn.Linear(4, 3)),
        SORTED,
    ),
    Entry("top expert", experts(top_expert), vectors(3)),
    Entry("two experts a token, sorted by expert", experts(two_experts_a_token), vectors(4, 3)),
    Entry(
        "weights gathered by expert",
        lambda: Net(grouped_weights, gate=nn.Linear(3, 2), weights=torch.randn(2, 3, 3)),
        vectors(3),
    ),
    Entry("attention of sequences in one", two_layers(attention_of_concatenated), MIXED),
    Entry("a layer applied to distinct values", two_layers(layers_of_distinct_values, width=1), vectors(3)),
    Entry(
        "pieces of the batch in reverse",
        two_layers(lambda m, x: torch.cat([m.o(torch.tanh(m.h(part))) for part in x.split(3)[::-1]][::-1])),
        vectors(3),
    ),
    Entry("examples chosen by experts", experts(chosen_by_experts, count=2), vectors(3), refused=COUPLED),
    Entry("experts with a capacity", experts(capacity, count=2), vectors(3), refused=COUPLED),
    Entry("batch statistics in eval mode", batch_norm_without_statistics, vectors(3), refused=COUPLED + "|more than 1"),
    Entry(
        "loss divided by the positives of the batch",
        lambda: nn.Linear(3, 1),
        innocent_labels,
        task=positives_of_the_batch,
        refused=COUPLED,
    ),
    Entry(
        "loss weighted by the class's share of the batch",
        lambda: nn.Linear(3, 3),
        vectors(3),
        task=lambda model, batch: (
            F.cross_entropy(model(batch[0]), batch[1], reduction="none") / batch[1].bincount()[batch[1]]
        ),
        refused="the task's loss that depends on the other samples",
    ),
    Entry("weight used functionally in later batches", two_layers(functional_in_later_batches), far_later),
    Entry("rank within the batch", two_layers(rank_of_examples), vectors(3), refused=COUPLED),
    Entry("adds the example before", two_layers(row_before), vectors(3), refused=COUPLED),
    Entry("mean over the longest example", two_layers(mean_over_longest), SORTED, refused=COUPLED),
    Entry(
        "centred by the batch",
        two_layers(lambda m, x: m.o(torch.tanh(m.h(x - x.mean(0))))),
        vectors(3),
        refused=COUPLED,
    ),
    Entry(
        "centred by the batch after it was sorted",
        lambda: Net(
            lambda m, x: m.o(m.c(torch.tanh(m.h(x[x[:, 0].argsort()]))))[x[:, 0].argsort().argsort()],
            h=nn.Linear(3, 5),
            c=Net(lambda m, x: x - x.mean(0)),
            o=nn.Linear(5, 3),
        ),
        vectors(3),
        refused="output of c ",
    ),
    Entry(
        "similarities to the other examples",
        two_layers(lambda m, x: m.o(torch.tanh(m.h(x))) @ m.o(torch.tanh(m.h(-x))).T),
        vectors(3),
        task=lambda model, batch: -model(batch[0]).log_softmax(1).diagonal(),
        refused="output of the model .* first that differs",
    ),
    Entry(
        "small coupling by the batch",
        two_layers(lambda m, x: m.o(torch.tanh(m.h(x - 1e-3 * x.mean(0))))),
        vectors(3),
        refused=COUPLED,
    ),
]
