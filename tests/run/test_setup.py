"""What a run's models are when its first step begins."""

from types import SimpleNamespace

import pytest
import torch

from prime_train.config.keys import Config
from prime_train.models.distributed import ALONE
from prime_train.run import setup
from tests.support.tiny import saved_model


@pytest.mark.parametrize("trained", [True, False])
def test_the_reference_is_computed_as_the_models_that_it_is_compared_with(trained, tmp_path):
    start = saved_model(tmp_path / "model")
    config = Config.model_validate(
        {"model": {"policy": start, "dtype": "float32", "blocks": ["checkpoint", "compile"]}}
    )
    model = setup.load_sharded(config, start, ALONE, trained=trained)
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    recomputed = {getattr(block, "gradient_checkpointing", False) for block in model.blocks}
    assert recomputed == {trained}  # the reference has no backward


def test_no_model_keeps_another_from_being_compiled(tmp_path, monkeypatch):
    """Policy, PRM and reference, each for shapes that no graph of another one fits."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    runs = []

    def counting(graph, _):
        def run(*args):
            runs.append(graph)
            return graph(*args)

        return run

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend=counting))
    start = saved_model(tmp_path / "model")
    config = Config.model_validate({"model": {"policy": start, "dtype": "float32", "blocks": ["compile"]}})
    policy, prm, reference = (setup.load_sharded(config, start, ALONE, trained=t) for t in (True, True, False))
    for rows, width in ((3, 20), (2, 31), (4, 17), (1, 40)):
        micro = SimpleNamespace(
            cu_tokens=None, longest=width, input_ids=torch.randint(20, (rows, width)), at=torch.arange(rows * width),
            position_ids=torch.arange(width).expand(rows, width).contiguous(), targets=torch.zeros(rows * width).long(),
        )  # fmt: skip
        for model, grad in ((reference, False), (prm, False), (policy, False), (prm, True), (policy, True)):
            runs.clear()
            with torch.set_grad_enabled(grad):
                model(micro)
            assert len(runs) == 1, (rows, width, grad)
