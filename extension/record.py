"""The evidence record of an image that is being saved."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from ..memorization_guard import Trace, evidence

if TYPE_CHECKING:
    from .session import Session


class Record(str):
    """The evidence record of an image that is being saved: ``str()`` of it is the record's JSON, empty where that failed.

    It is made when the host asks for that, to write it. By then whatever changes the image has done so: other extensions, and
    Forge, which hides the infotext in the pixels after the last of them. To extensions that look at all texts of an image
    it is an empty one.
    """

    def __new__(cls, *_: Any) -> Record:
        return super().__new__(cls)

    def __init__(self, session: Session, params: Any, found: list[tuple[Trace, str]]) -> None:
        self._session = session
        self._params = params
        self._found = found

    def __str__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        try:
            record = evidence.record(
                [trace for trace, _ in self._found],
                runs=[run for _, run in self._found],
                pixels=[evidence.pixel_hash(self._params.image)],
                settings=self._params.pnginfo.get("parameters"),
                settings_in="parameters",
            )
            return json.dumps(record, allow_nan=False)
        except Exception as error:  # the image is to be saved all the same
            self._session.say(self._params.p, f"no evidence in the image: {type(error).__name__}: {error}")
            return ""
