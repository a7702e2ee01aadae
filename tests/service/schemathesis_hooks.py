"""What tests/service/test_openapi.py adds to schemathesis: headers that fit the body, which no document can express."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis.core.parameters import ParameterLocation

ABOUT_THE_BODY = ("Inference-Header-Content-Length", "Content-Encoding")


@schemathesis.hook
def before_call(_: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Leave out what would hide the body.

    A good length or encoding that is not this body's is a 400 before the service looks at the JSON. Bad ones stay.
    """
    del kwargs
    if case.meta is not None and not case.meta.is_negative_at(ParameterLocation.HEADER):
        for name in ABOUT_THE_BODY:
            case.headers.pop(name, None)
