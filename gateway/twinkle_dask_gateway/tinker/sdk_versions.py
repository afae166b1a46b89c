"""What older SDKs cannot read.

They refuse an answer with a word that they do not know, so one export in a list would hide the
whole list from them.
"""

import re
from typing import Annotated, Final

from fastapi import Depends, Request

#: The first SDK that knows the checkpoint type ``external``.
_EXPORTS: Final = (0, 28)


async def _knows_exports(request: Request) -> bool:
    """Whether a list may hold exports; who does not say which SDK it is gets everything."""
    version = request.headers.get("x-stainless-package-version", "")
    found = re.match(r"(\d{1,6})\.(\d{1,6})", version)
    return found is None or (int(found[1]), int(found[2])) >= _EXPORTS


KnowsExports = Annotated[bool, Depends(_knows_exports)]
