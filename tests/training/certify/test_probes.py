"""Which rows are asked, and that no model is loaded that cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from pipeline.errors import OutOfMemory
from pipeline.verify.score import spread
from training.certify import probes
from training.memory import Need


@pytest.mark.parametrize(
    ("count", "wanted", "found"), [(204, 1, [0]), (1, 1, [0]), (3, 5, [0, 1, 2]), (9, 3, [0, 4, 8]), (204, 2, [0, 203])]
)
def test_rows_are_evenly_spread(count: int, wanted: int, found: list[int]) -> None:
    assert spread(count, wanted) == found


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # no machine has this little: the need is made larger than any
    monkeypatch.setattr(probes, "evaluate_need", lambda folder, on_gpu: Need(1e6, "weights"))
    with pytest.raises(OutOfMemory, match="comparing distributions"):
        probes._loaded(tmp_path)


@pytest.fixture(scope="module", params=["4.1", pytest.param("4.0-hybrid", marks=[pytest.mark.slow, pytest.mark.wide])])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> probes._Model:
    """A tiny random Granite, a ninth of whose tokens end an answer."""
    pytest.importorskip("torch")
    model = probes._Model(tiny.make(request.param, tmp_path_factory.mktemp("small")))
    model.model.generation_config.eos_token_id = list(range(0, 49152, 9))
    return model


def test_only_asked_positions_are_computed_and_with_the_models_own_values(small: probes._Model) -> None:
    torch = pytest.importorskip("torch")
    passages = [
        probes.Passage(i, [(3000 * i + 7 * j) % 49152 for j in range(5 + i)], [1, 4, 4 + i][: 1 + i % 3]) for i in range(11)
    ]
    found = small.log_probabilities(passages)
    with torch.inference_mode():
        logits = [small.model(torch.tensor([one.ids])).logits[0, one.positions] for one in passages]
    assert torch.allclose(found, torch.log_softmax(torch.cat(logits), dim=-1), atol=1e-5)
    assert not small.model.get_output_embeddings()._forward_pre_hooks


def test_prompts_go_on_together_as_they_do_alone(small: probes._Model) -> None:
    torch = pytest.importorskip("torch")
    prompts = [probes.Passage(i, [(1700 * i + 11 * j) % 49152 for j in range(3 + i % 5)], []) for i in range(24)]
    together = small.continued(prompts, 12)
    for one, found in zip(prompts, together, strict=True):
        start = torch.tensor([one.ids])
        alone = small.model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=12, do_sample=False)[0].tolist()
        assert found.ids == alone
        assert found.positions[0] == len(one.ids) - 1 and found.positions[-1] == len(alone) - 2
    # some end by themselves, at different lengths
    assert len({len(found.ids) - len(one.ids) for one, found in zip(prompts, together, strict=True)}) > 1
