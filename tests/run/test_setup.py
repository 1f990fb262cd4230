"""What a run's models are when its first step begins."""

import pytest

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
