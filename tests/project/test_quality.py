"""The pieces of the quality benchmark do what they say, on made-up rows and networks of a few parameters."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import numpy as np
import pytest
import torch
from benchmark_scripts import script
from torch import nn

from tracer.api.store_reader import StoreReader
from tracer.metrics import lds
from tracer.retraining import Recipe, train_models

NUM_TRAIN, NUM_TARGETS = 60, 12


@pytest.fixture(scope="module")
def quality():
    with script("quality") as module:
        yield module


@pytest.fixture(scope="module")
def grade(quality):
    return sys.modules[quality.Truth.__module__].grade  # of the same import as `quality`


def clusters(flip_rate=0.0, num_train=NUM_TRAIN):
    """Three clouds of points, some of their training labels wrong."""
    generator = torch.Generator().manual_seed(0)
    count = num_train + NUM_TARGETS
    y = torch.arange(count) % 3
    x = 3 * torch.eye(4)[y] + 0.5 * torch.randn(count, 4, generator=generator)
    flipped = np.zeros(num_train, dtype=bool)
    flipped[: round(flip_rate * num_train)] = True
    labels = y.clone()
    labels[:num_train][flipped] = (labels[:num_train][flipped] + 1) % 3
    return (x[:num_train], labels[:num_train]), (x[num_train:], y[num_train:]), flipped if flip_rate else None


@pytest.fixture(scope="module")
def task(quality):
    def load():
        return quality.Data(*clusters(0.2))

    return quality.Task(
        name="logistic",
        title="three clouds",
        kind="image_classification",
        make_model=lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        load=load,
        recipe=Recipe(learning_rate=0.2, batch_size=15, epochs=6, schedule="linear"),
        checkpoint_epochs=(1, 3, 6),
        last_layer="2",
        num_subsets=12,
        num_seeds=2,
        num_removals=5,
        num_removed=4,
    )


@pytest.fixture(scope="module")
def data(task):
    return task.load()


@pytest.fixture(scope="module")
def case(quality, task, data):
    return quality.make_case(task, data)


@pytest.fixture(scope="module")
def truth(quality, task, data, tmp_path_factory):
    return quality.ground_truth(task, data, tmp_path_factory.mktemp("cache"))


def loss_gradients(model, rows):
    """Each row's loss gradient by a loop of autograd: ``[B, parameters]``."""
    found = []
    for x, y in zip(*rows, strict=True):
        loss = nn.functional.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0))
        parts = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def tracin(case):
    scores = np.zeros(case.sizes)
    for model, (_, rate) in zip(case.states(), case.checkpoints, strict=True):
        scores += rate * (loss_gradients(model, case.train) @ loss_gradients(model, case.targets).T).numpy()
    return scores


def found_by(methods, name, case, folder):
    (method,) = [method for method in methods if method.name == name]
    return method.run(case, folder)


@pytest.fixture(scope="module")
def variant(quality):
    """Gives a variant of tracer by its label, with some of its estimators."""
    variants = {one.label: one for one in sys.modules[quality.tracer_methods.__module__].VARIANTS}
    return lambda label, *estimators: dataclasses.replace(variants[label], estimators=estimators)


# tasks


def test_a_tenth_of_the_digits_labels_is_flipped_and_marked():
    pytest.importorskip("sklearn")
    with script("quality_tasks") as module:
        right, wrong = module.digits(images=True), module.digits(flip_rate=0.1, images=True)
    differ = (right.train[1] != wrong.train[1]).numpy()
    assert differ.sum() == 100 and np.array_equal(differ, wrong.flipped) and right.flipped is None
    assert wrong.train[0].shape == (1000, 1, 8, 8) and wrong.targets[0].shape == (200, 1, 8, 8)
    assert torch.equal(right.targets[1], wrong.targets[1])


def test_sentences_become_word_numbers_by_frequency(tmp_path, monkeypatch):
    (tmp_path / "sst2_train.tsv").write_text("a b a\t1\nb a c\t0\n")
    (tmp_path / "sst2_dev.tsv").write_text("a never c\t1\n")
    monkeypatch.setenv("TRACER_DATA", str(tmp_path))
    with script("quality_tasks") as module:
        found = module.sentences()
        model = module.SentenceClassifier()
    assert found.train[0][:, :4].tolist() == [[2, 3, 2, 0], [3, 2, 4, 0]]
    assert found.targets[0][0, :4].tolist() == [2, 1, 4, 0] and found.train[1].tolist() == [1, 0]
    assert model(found.train[0]).shape == (2, 2)


def test_images_and_text_are_read_from_the_data_folder(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 30), ("test", 10)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = generator.integers(0, 10, count)
    np.savez(tmp_path / "cifar10_10k.npz", **arrays)
    (tmp_path / "tinyshakespeare.txt").write_text("".join(generator.choice(list("to be or not"), 3000)))
    (tmp_path / "sst2_train.tsv").write_text("to be or not to be\t1\nnot a robot\t0\n" * 40)
    monkeypatch.setenv("TRACER_DATA", str(tmp_path))
    with script("quality_tasks") as module:
        images, text, reviews = module.cifar(20, 5), module.characters(8, 3), module.reviews(5, 2)
    assert reviews.train[0].shape == (5, 64) and reviews.targets[1].shape == (2, 64)
    assert torch.equal(reviews.train[0][1:, 0], reviews.train[1][:-1, -1])  # windows follow one another
    assert images.train[0].shape == (20, 3, 16, 16) and images.targets[1].tolist() == arrays["y_test"][:5].tolist()
    expected = ((arrays["x_train"][0, :2, :2, 1] / 255.0 - 0.45) / 0.25).mean()
    assert images.train[0][0, 1, 0, 0].item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(text.train[0][:, 1:], text.train[1][:, :-1]) and text.targets[0].shape == (3, 64)


def test_a_task_without_its_data_is_left_out_with_the_reason(quality, task, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACER_DATA", str(tmp_path))
    with script("quality_tasks") as module:
        absent = dataclasses.replace(task, load=module.cifar)
    assert quality.measure_task(absent, None) == []
    assert f"left out, there is no cifar10_10k.npz in {tmp_path}; TRACER_DATA names" in capsys.readouterr().out


def test_every_task_builds_and_names_the_layer_that_gives_the_logits(monkeypatch):
    with script("quality_tasks") as module:
        monkeypatch.setattr(module, "alphabet", lambda: dict.fromkeys("abc"))
        monkeypatch.setattr(module, "pretrained", module.TextDecoder(3, 96, 3).state_dict)  # as if trained
        monkeypatch.setattr(module, "pretrained_on_sentences", dict)
        for task in module.TASKS:
            model = task.make_model()
            layer = model.get_submodule(task.last_layer)
            assert isinstance(layer, nn.Linear) and list(model.modules())[-1] is layer or task.last_layer == "head"
            assert task.checkpoint_epochs[-1] == task.recipe.epochs


def test_row_losses_are_means_over_positions():
    with script("quality_methods") as module:
        logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
        expected = [nn.functional.cross_entropy(one, label) for one, label in zip(logits, labels, strict=True)]
        assert torch.allclose(module.row_losses(logits, labels), torch.stack(expected))
        flat = module.row_losses(logits[:, 0], labels[:, 0])
    assert torch.allclose(flat, nn.functional.cross_entropy(logits[:, 0], labels[:, 0], reduction="none"))


# ground truth and grades


def test_ground_truth_is_of_halves_and_of_removals(truth):
    assert truth.masks.shape == (12, NUM_TRAIN) and (truth.masks.sum(1) == NUM_TRAIN // 2).all()
    assert truth.outputs.shape == (12, NUM_TARGETS) and truth.changes.shape == (5, NUM_TARGETS)
    assert truth.removed.shape == (5, 4) and 0 < truth.ceiling <= 1


def test_changes_are_what_the_removed_rows_gave(task, data, truth):
    masks = np.ones((2, NUM_TRAIN), dtype=bool)
    masks[1, truth.removed[3]] = False
    outputs = np.zeros((2, NUM_TARGETS))
    model, options = task.make_model(), {"seeds": [0, 1], "paired": True}
    for trained in train_models(task.make_model, task.kind, data.train, task.recipe, masks, **options):
        model.load_state_dict(trained.state)
        own = model(data.targets[0]).softmax(1).gather(1, data.targets[1].unsqueeze(1)).squeeze(1)
        outputs[trained.subset] += own.logit().detach().numpy() / 2
    np.testing.assert_allclose(truth.changes[3], outputs[0] - outputs[1], rtol=1e-2, atol=1e-4)


def test_ground_truth_is_taken_up_again(quality, task, data, truth, monkeypatch, tmp_path):
    first = quality.ground_truth(task, data, tmp_path)
    monkeypatch.setattr("tracer.retraining.training.Trainer.train", None)  # nothing may be trained
    again = quality.ground_truth(task, data, tmp_path)
    np.testing.assert_array_equal(first.outputs, again.outputs)
    np.testing.assert_array_equal(first.changes, again.changes)


def test_scores_that_predict_the_outputs_get_a_perfect_grade(quality, data, grade):
    rng = np.random.default_rng(0)
    scores, masks = rng.normal(size=(NUM_TRAIN, NUM_TARGETS)), rng.random((20, NUM_TRAIN)) < 0.5
    removed = np.stack([rng.permutation(NUM_TRAIN)[:4] for _ in range(6)])
    truth = quality.Truth(masks, masks @ scores, removed, scores[removed].sum(1))
    row = grade(quality.Found("m", scores, 3.0), truth, data, plain=1.5)
    assert row["lds"] == pytest.approx(1) and row["removal"] == pytest.approx(1) and row["ratio"] == 2
    opposite = grade(quality.Found("m", -scores, 3.0), truth, data, plain=1.5)
    assert opposite["lds"] == pytest.approx(-1) and opposite["removal"] == pytest.approx(-1)


def test_rows_that_harm_and_rows_that_influence_themselves_are_ranked_first(quality, truth, data, grade):
    scores = np.where(data.flipped, -1.0, 1.0)[:, None] * np.ones(NUM_TARGETS)
    found = quality.Found("m", scores, suspicion=lambda: data.flipped * 2.0)
    row = grade(found, truth, data, 1.0)
    best = 1 - 0.2 / 2  # a fifth is flipped
    assert row["auc_harm"] == pytest.approx(best) and row["auc_own"] == pytest.approx(best)
    assert row["curve_own"][0] == 0 and row["curve_own"][20] == 1


def test_what_fails_has_a_row_that_says_why(quality, case, truth, data):
    def fail(case, folder):
        raise ValueError("no such thing")

    def nan(case, folder):
        return [quality.Found("b", np.full(case.sizes, np.nan), 1.0, suspicion=fail)]

    methods = [
        quality.Method("a", fail),
        quality.Method("b", nan),
        quality.Method("c", fail, package="no_such_package"),
        quality.Method("d", fail, unfit=lambda case: "too large"),
    ]
    errors = [row["error"] for row in quality.measure(methods, case, truth, data)]
    assert errors == [
        "ValueError: no such thing",
        "100% of the scores are not finite",
        "left out: no_such_package is not installed",
        "left out: too large",
    ]


def test_methods_that_compute_the_same_are_compared(quality, case, truth, data, monkeypatch):
    scores = np.random.default_rng(0).normal(size=case.sizes)
    methods = [
        quality.Method("a", lambda case, folder: [quality.Found("a", scores)]),
        quality.Method("b", lambda case, folder: [quality.Found("b", np.exp(scores))]),
    ]
    monkeypatch.setattr(quality, "PAIRS", [("a", "b"), ("a", "absent")])
    found = [row for row in quality.measure(methods, case, truth, data) if "agreement" in row]
    assert found == [{"agreement": "a | b", "spearman": pytest.approx(1)}]


def test_results_of_other_tasks_and_methods_stay(quality, tmp_path):
    machine = quality.machine()
    old = [
        {"task": "mlp", "method": "a", "lds": 1},
        {"task": "logistic", "method": "a"},
        {"task": "mlp", "method": "b"},
    ]
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"machine": machine, "rows": old}))
    rows = quality.merged(path, [{"task": "mlp", "method": "a", "lds": 2}])
    assert rows == [old[1], old[2], {"task": "mlp", "method": "a", "lds": 2}]
    path.write_text(json.dumps({"machine": {**machine, "cores": 1234}, "rows": old}))
    assert quality.merged(path, rows[-1:]) == rows[-1:]


def test_a_comparison_goes_when_one_of_its_methods_is_measured_again(quality, tmp_path):
    sides = ("tracer a | b, x=1", "tracer c | d", "tracer c | b")
    old = [{"task": task, "comparison": each} for task in ("logistic", "mlp") for each in sides]
    (tmp_path / "quality.json").write_text(json.dumps({"machine": quality.machine(), "rows": old}))
    rows = quality.merged(tmp_path / "quality.json", [{"task": "mlp", "method": "b", "lds": 2}])
    assert [row for row in rows if "comparison" in row] == [*old[:3], old[4]]


# tracer's contenders


def test_exact_and_sketched_tracin_are_sums_over_a_loop_of_autograd(quality, variant, case, tmp_path):
    methods = quality.tracer_methods()
    (exact, cosine) = found_by(methods, "tracer, exact", case, tmp_path / "exact")
    np.testing.assert_allclose(exact.scores, tracin(case), rtol=1e-3, atol=1e-5)
    assert (exact.name, cosine.name) == ("tracer tracin, exact", "tracer cosine, exact")
    (sketched,) = variant("k=4096", "tracin").run(case, tmp_path / "sketch")
    assert quality.rank_correlation(exact.scores, sketched.scores) > 0.98
    assert 3 * 2 * 4096 < sketched.row_bytes < 3.5 * 2 * 4096
    own = [np.square(np.linalg.norm(loss_gradients(model, case.train), axis=1)) for model in case.states()]
    expected = sum(rate * norms for (_, rate), norms in zip(case.checkpoints, own, strict=True))
    np.testing.assert_allclose(exact.suspicion(), expected, rtol=1e-3)


def test_source_gets_sums_of_rates_and_each_run_for_itself(variant, case, tmp_path):
    (one,) = variant("k=1024, shared", "source").run(case, tmp_path / "one")
    (three,) = variant("k=1024, shared, 3 runs", "source").run(case, tmp_path / "three")
    store = StoreReader.open(tmp_path / "three" / "store")
    first = len(case.checkpoints)
    rates = [store.store.table_attributes(number)["learning_rate"] for number in range(3 * first)]
    assert rates == pytest.approx(case.rate_sums)
    np.testing.assert_allclose(store.finalize_scores("targets", "source", [*range(first)]), one.scores, rtol=1e-4)
    assert three.scores.shape == one.scores.shape and abs(three.scores - one.scores).max() > 0


def test_variants_take_the_checkpoints_and_parameters_that_they_say(variant, case, tmp_path):
    (last,) = variant("k=1024, last checkpoint", "tracin").run(case, tmp_path / "last")
    (several,) = variant("k=1024, 3 runs", "tracin").run(case, tmp_path / "all")
    assert several.row_bytes == pytest.approx(9 * last.row_bytes, rel=0.02)
    (only,) = variant("last layer", "tracin").run(case, tmp_path / "layer")
    expected = np.zeros(case.sizes)
    for model, (_, rate) in zip(case.states(), case.checkpoints, strict=True):
        parts = [loss_gradients(model, rows)[:, -21:] for rows in (case.train, case.targets)]  # 6 x 3 weights, 3 biases
        expected += rate * (parts[0] @ parts[1].T).numpy()
    np.testing.assert_allclose(only.scores, expected, rtol=1e-3, atol=1e-5)


def test_adams_second_moments_go_with_the_checkpoints(quality, variant, task, data, tmp_path):
    adam = dataclasses.replace(task, recipe=Recipe("adamw", learning_rate=0.01, epochs=6, batch_size=15))
    case = quality.make_case(adam, data)
    methods = quality.tracer_methods()
    plain = found_by(methods, "tracer, exact", case, tmp_path / "plain")[0].scores
    found = variant("k=1024, Adam", "tracin").run(case, tmp_path / "adam")[0].scores
    expected = np.zeros(case.sizes)
    for model, (_, rate), state in zip(case.states(), case.checkpoints, case.optimizers, strict=True):
        parts = [entry["exp_avg_sq"].flatten() / (1 - 0.999 ** entry["step"]) for entry in state["state"].values()]
        scale = 1 / (torch.cat(parts).sqrt() + 1e-8)
        rows = loss_gradients(model, case.train), loss_gradients(model, case.targets)
        expected += rate * ((rows[0] * scale) @ rows[1].T).numpy()
    assert quality.rank_correlation(expected, found) > 0.97 > quality.rank_correlation(plain, found)


def test_a_sweep_is_around_the_regularization_that_tracer_chooses(variant, case, tmp_path, monkeypatch):
    found = variant("k=1024", "trak")
    monkeypatch.setitem(found.settings.__globals__, "FACTORS", (0.1, 1.0))
    chosen, lower, same = found.run(case, tmp_path)
    assert chosen.setting == {} and chosen.facts["rule"] in ("held-out", "trace")
    assert lower.setting == {"regularization": pytest.approx(0.1 * chosen.facts["regularization"])}
    np.testing.assert_allclose(chosen.scores, same.scores, rtol=1e-4, atol=1e-7)
    assert not np.allclose(chosen.scores, lower.scores, rtol=1e-2)


# the field's methods


def test_a_decoder_becomes_a_gpt2_with_the_same_outputs_for_bergson():
    pytest.importorskip("transformers")
    with script("quality_bergson") as module, script("models") as models:
        torch.manual_seed(0)
        model = models.Decoder(11, 16, 2, 2, length=9).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        tokens = torch.randint(0, 11, (3, 9))
        torch.testing.assert_close(module.gpt2(model)(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_texts_for_bergson_are_the_numbers_of_rows_and_of_the_last_label(tmp_path):
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    x = torch.tensor([[0, 3, 10, 2], [5, 5, 1, 0]])
    y = torch.tensor([[3, 10, 2, 7], [5, 1, 0, 9]])
    with script("quality_bergson") as module:
        module.save_texts((x, y), tmp_path / "rows")
        module.save_tokenizer(11, tmp_path / "model")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    texts = datasets.load_from_disk(str(tmp_path / "rows"))["text"]
    assert [tokenizer(text)["input_ids"] for text in texts] == [[0, 3, 10, 2, 7], [5, 5, 1, 0, 9]]


def test_logra_gives_each_row_its_own_scores_and_proponents_positive_ones(quality, case, tmp_path):
    pytest.importorskip("logix")
    (default, damped) = found_by(quality.peer_methods(), "logix LoGra, last checkpoint", case, tmp_path)
    last = case.copied(checkpoints=case.checkpoints[-1:])
    assert default.scores.shape == case.sizes and default.row_bytes > 0
    assert quality.rank_correlation(damped.scores, tracin(last)) > 0.3


def test_kronfluence_gives_proponents_positive_scores(quality, case, tmp_path):
    pytest.importorskip("kronfluence")
    (default, heuristic) = found_by(quality.peer_methods(), "kronfluence EK-FAC, last checkpoint", case, tmp_path)
    assert default.setting == {} and heuristic.setting == {"damping": "0.1 of the mean"}
    assert default.scores.shape == case.sizes and default.suspicion().shape == case.sizes[:1]
    last = case.copied(checkpoints=case.checkpoints[-1:])
    assert quality.rank_correlation(heuristic.scores, tracin(last)) > 0.5


def test_captum_computes_the_same_tracin(quality, case, tmp_path):
    pytest.importorskip("captum")
    (found,) = found_by(quality.peer_methods(), "captum TracInCP", case, tmp_path)
    np.testing.assert_allclose(found.scores, tracin(case), rtol=1e-3, atol=1e-5)
    assert quality.rank_correlation(found.scores, tracin(case)) > 0.999


@pytest.mark.parametrize("name", ["captum TracInCPFast", "captum Arnoldi", "captum Naive"])
def test_captum_gives_proponents_positive_scores(quality, case, truth, data, tmp_path, name, grade):
    pytest.importorskip("captum")
    row = grade(found_by(quality.peer_methods(), name, case, tmp_path)[0], truth, data, 1.0)
    assert row["lds"] > 0.1


@pytest.mark.parametrize(
    "name",
    ["TracIn, k=512", "TRAK, k=512", "influence, Explicit", "influence, CG", "influence, EKFAC, repaired", "RPS"],
)
def test_dattri_gives_proponents_positive_scores(quality, case, truth, data, tmp_path, name, grade):
    pytest.importorskip("dattri")
    found = found_by(quality.peer_methods(), f"dattri {name}", case, tmp_path)
    assert max(grade(one, truth, data, 1.0).get("lds", 0) for one in found) > 0.1


def test_traker_computes_the_formula_but_for_its_rescaling(quality, case, tmp_path):
    pytest.importorskip("trak")
    found = quality.traker_agreement(case, tmp_path, proj_dim=128, ridge=0.1)  # k of at most 100 fails in traker 0.3.2
    assert found["one"] > 0.999 and found["all, rescaled"] > 0.999
    assert found["all"] < found["all, rescaled"]


def test_the_formula_of_trak_on_one_row_and_one_value():
    with script("quality_peers") as module:
        phi, target, loss_grad = np.array([[2.0], [1.0]]), np.array([[3.0]]), np.array([0.5, 0.25])
        plain = module.trak_formula([phi], [target], [loss_grad], ridge=1.0)
        np.testing.assert_allclose(plain, [[2 / 6 * 3 * 0.5], [1 / 6 * 3 * 0.25]])  # 2² + 1² + 1 = 6
        rescaled = module.trak_formula([phi, 2 * phi], [target] * 2, [loss_grad] * 2, ridge=1.0, rescale=True)
    np.testing.assert_allclose(rescaled, [[1.5 * 2 * 3 * 0.5], [1.5 * 3 * 0.25]])  # each inverse is divided by itself


def test_a_setting_that_fails_keeps_the_others(case, tmp_path):
    with script("quality_methods") as module:

        def run(case, folder, damping=0.0):
            if not damping:
                raise ZeroDivisionError("by\nzero")
            return module.Found("", np.full(case.sizes, damping))

        first, second = module.timed("m", run, [{}, {"damping": 2.0}])(case, tmp_path)
    assert (first.name, first.error, first.scores) == ("m", "ZeroDivisionError: by", None)
    assert second.setting == {"damping": 2.0} and (second.scores == 2).all() and second.seconds > 0


# baselines


@pytest.mark.parametrize(
    "name",
    [
        "loss, last checkpoint",
        "loss, mean of checkpoints",
        "margin, last checkpoint",
        "gradient norm, mean of checkpoints",
    ],
)
def test_cheap_rankings_find_wrong_labels(quality, case, truth, data, tmp_path, name, grade):
    (found,) = found_by(quality.baseline_methods(), name, case, tmp_path)
    row = grade(found, truth, data, 1.0)
    assert row["auc_own"] > 0.85 and "lds" not in row


def test_gradient_norms_are_those_of_autograd(case):
    with script("quality_baselines") as module:
        norms = module.gradient_norm(case)
    expected = [np.linalg.norm(loss_gradients(model, case.train), axis=1) for model in case.states()]
    np.testing.assert_allclose(norms, np.mean(expected, axis=0), rtol=1e-4)


def test_embeddings_are_what_the_last_layer_gets(case):
    with script("quality_baselines") as module:
        found = module.embeddings(case.model, case.last_layer, case.train[0])
    expected = case.model[1](case.model[0](case.train[0])).detach()
    assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-6)


def test_embedding_scores_are_negative_for_other_labels(quality, case, tmp_path):
    plain, own = found_by(quality.baseline_methods(), "embedding", case, tmp_path)
    same = (case.train[1].unsqueeze(1) == case.targets[1]).numpy()
    np.testing.assert_array_equal(own.scores, np.where(same, plain.scores, -plain.scores))


def test_neighbours_tell_wrong_labels(quality, case, truth, data, tmp_path, grade):
    own = found_by(quality.baseline_methods(), "embedding", case, tmp_path)[1]
    assert grade(own, truth, data, 1.0)["auc_own"] > 0.85


def test_confident_learning_asks_networks_that_did_not_see_the_row(quality, data, task):
    """Labels without a pattern can be learned by heart, not predicted."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 30, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    recipe = Recipe(learning_rate=1.0, batch_size=20, epochs=60)
    noise = dataclasses.replace(
        task,
        make_model=lambda: nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)),
        recipe=recipe,
        checkpoint_epochs=(60,),
    )
    case = quality.make_case(noise, quality.Data(rows, rows))
    with script("quality_baselines") as module:
        held_out = module.out_of_fold(case)
        seen = module.logits_of(case.model, rows[0]).softmax(1)
    assert held_out.shape == (60, 3) and torch.allclose(held_out.sum(1), torch.ones(60))
    assert (seen.argmax(1) == rows[1]).float().mean() > 0.95
    assert (held_out.argmax(1) == rows[1]).float().mean() < 0.6


def test_confident_learning_finds_wrong_labels(quality, case, truth, data, tmp_path, grade):
    for found in found_by(quality.baseline_methods(), "confident learning", case, tmp_path):
        assert grade(found, truth, data, 1.0)["auc_own"] > 0.85


def test_random_scores_know_nothing(quality, case, truth, data, tmp_path, grade):
    (found,) = found_by(quality.baseline_methods(), "random", case, tmp_path)
    assert abs(grade(found, truth, data, 1.0)["lds"]) < 0.4


def test_language_models_have_no_baselines_of_one_label_a_row(quality, case):
    text = dataclasses.replace(case, task="language_modeling")
    unfit = {method.name for method in quality.baseline_methods() if method.unfit(text)}
    assert unfit == {"margin, last checkpoint", "BM25", "confident learning"}  # its rows are images


def test_bm25_finds_the_row_with_the_words_of_the_target(quality, case, tmp_path):
    pytest.importorskip("bm25s")
    words = torch.tensor([[2, 3, 4, 0], [2, 5, 6, 7], [2, 3, 8, 0]])
    given = (words, torch.zeros(3, dtype=torch.long))
    text = dataclasses.replace(
        case, task="text_classification", train=given, targets=(words[:, [2, 0, 3, 1]], given[1])
    )
    (found,) = found_by(quality.baseline_methods(), "BM25", text, tmp_path)
    assert found.scores.argmax(0).tolist() == [0, 1, 2]


# the command


def test_the_command_prints_tables_and_writes_results_and_pictures(quality, task, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quality, "TASKS", [task])
    arguments = [
        "--quick",
        "--methods",
        "k=256,random,loss",
        "--output-dir",
        str(tmp_path),
        "--cache",
        str(tmp_path / "c"),
    ]
    quality.main(arguments)
    printed = capsys.readouterr().out
    assert "three clouds: 51 parameters, 60 rows, 12 targets" in printed and "| tracer tracin, k=256 " in printed
    rows = json.loads((tmp_path / "quality_quick.json").read_text())["rows"]
    by_name = {row["method"]: row for row in rows if "method" in row}
    assert by_name["tracer tracin, k=256"]["lds"] > by_name["random"]["lds"]
    for name in ("recovery", "cost"):
        assert (tmp_path / f"quality_quick_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_that_is_not_known_is_told(quality, capsys):
    with pytest.raises(SystemExit):
        quality.main(["--tasks", "mnist"])
    assert "--tasks: mnist not among logistic, mlp, flipped, cifar, sst2, shakespeare" in capsys.readouterr().err


def test_sweeps_are_drawn_with_what_tracer_chose(tmp_path):
    pytest.importorskip("matplotlib")
    common = {"task": "t", "method": "tracer trak, k=4096", "ratio": 2.0, "row_bytes": 8.0}
    rows = [{"task": "t", "title": "a task"}, {**common, "setting": {}, "lds": 0.5, "regularization": 3.0}]
    rows += [{**common, "setting": {"regularization": 10.0**power}, "lds": 0.4} for power in range(3)]
    with script("quality_figures") as module:
        written = module.draw(rows, tmp_path / "q")
        assert len(module.sweeps(rows)[("t", "tracer trak, k=4096")]) == 3
    assert [path.name for path in written] == ["q_cost.png", "q_lambda.png"]


def test_the_best_setting_has_a_row_of_its_own():
    rows = [{"method": "a", "setting": {}, "lds": 0.1}, {"method": "a", "setting": {"x": 2.0}, "lds": 0.3}]
    rows += [{"method": "b", "setting": {}, "error": "none"}, {"method": "c", "setting": {}, "lds": 0.2}]
    with script("quality_tables") as module:
        assert [row["method"] for row in module.best_of(rows)] == ["a", "a, best of 2: x=2", "b", "c"]


def graded(method, lds, setting=None, task="t"):
    return {
        "task": task,
        "method": method,
        "setting": setting or {},
        "lds": lds,
        "lds_interval": [lds - 0.02, lds + 0.02],
    }


def test_without_a_method_of_each_side_nobody_leads():
    with script("quality_tables") as module:
        assert len(module.leaders([]).splitlines()) == 2  # the header alone


def test_the_leader_of_a_task_is_tracers_best_default_against_the_best_of_other_libraries():
    rows = [graded("tracer tracin", 0.3), graded("tracer influence", 0.5), graded("tracer trak", 0.9, {"ridge": 1.0})]
    rows += [graded("tracer influence, 3 runs", 0.8), graded("embedding", 0.7)]
    rows += [
        graded("captum", 0.6, task="u"),
        graded("dattri EKFAC", 0.2),
        graded("dattri EKFAC", 0.49, {"damping": 0.1}),
    ]
    with script("quality_tables") as module:
        (line,) = module.leaders(rows).splitlines()[2:3]
        assert [cell.strip() for cell in line.split("|")[1:-1]] == [
            "t",
            "tracer influence: 0.500 (0.480 to 0.520)",
            "dattri EKFAC: 0.200 (0.180 to 0.220)",
            "dattri EKFAC, damping=0.1: 0.490 (0.470 to 0.510)",
            "no",
        ]
        rows[-1]["lds"] = 0.47
        rows += [
            {"task": "t", "comparison": f"tracer {name} | dattri EKFAC", "difference": 0.1, "interval": [0.05, 0.2]}
            for name in ("tracin", "influence")
        ]
        table, note = module.leaders(rows).split("\n\n")
    assert "| yes " in table and note == "t: tracer influence | dattri EKFAC: +0.100 (+0.050 to +0.200)"


def test_a_comparison_is_the_difference_of_lds_on_the_same_resamples(quality, truth, case):
    generator = np.random.default_rng(0)
    ours, theirs, worse = (generator.normal(size=case.sizes) for _ in range(3))
    rows = [(graded("tracer tracin", 0.5), ours), (graded("captum TracInCP", 0.2), theirs)]
    rows.append((graded("captum TracInCP", 0.1, {"x": 1.0}), worse))
    with script("quality_tables") as module:
        (found,) = module.comparisons(rows, truth)
    left, right = (lds(scores, truth.masks, truth.outputs) for scores in (ours, theirs))
    assert found["comparison"] == "tracer tracin | captum TracInCP"
    assert found["difference"] == pytest.approx(left.mean - right.mean)
    assert found["interval"] == pytest.approx(list(left.difference(right)))


def test_a_method_runs_in_a_process_of_its_own():
    import os

    with script("quality_process") as module:
        assert module.in_own_process(os.getpid) != os.getpid()
        with pytest.raises(module.ProcessError, match="ended with exit code 7"):
            module.in_own_process(lambda: os._exit(7))
        with pytest.raises(module.ProcessError, match="ZeroDivisionError: division by zero"):
            module.in_own_process(lambda: 1 / 0)


def test_a_row_has_the_seconds_and_the_peak_memory_of_its_method(quality, case, truth, data):
    def run(case, folder):
        held = np.ones(25_000_000)  # 200 MB
        time.sleep(0.1)
        return [quality.Found("a", np.ones(case.sizes) * held[0], 1.0)]

    (row,) = quality.measure([quality.Method("a", run)], case, truth, data)
    assert 190 < row["peak_mb"] < 300 and row["seconds"] == 1.0
