"""The pytest plug-in: a fixture that fails a test whose model does not train as μP promises.

    def test_my_model(assert_mup):
        assert_mup(lambda width: MyModel(width), recipe, widths=[64, 128, 256], batch=batch, loss=loss)

Nothing is imported before a test asks for it.
"""

from collections.abc import Callable

import pytest


@pytest.fixture
def assert_mup() -> Callable[..., None]:
    """`mup_megatron.check.run_modules.assert_mup`."""
    from mup_megatron.check.run_modules import assert_mup as function

    return function
