"""Images in the requests themselves."""

import asyncio
import base64

import pytest

from llava_jax.data.image_paths import locate_image
from llava_jax.serving.images import Images
from llava_jax.serving.limits import Limits

DATA = bytes(range(250, 256)) * 7 + b"end"
FORMS = {
    "padded": base64.b64encode(DATA + b"x").decode(),
    "unpadded": base64.b64encode(DATA + b"x").decode().rstrip("="),
    "alphabet for URLs": base64.urlsafe_b64encode(DATA + b"x").decode(),
    "line ends": "\n".join(base64.b64encode(DATA + b"x").decode()),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_server_reads_what_training_reads(form):
    url = f"data:image/png;base64,{FORMS[form]}"
    assert asyncio.run(Images(Limits()).fetch(url)) == DATA + b"x"
    assert locate_image(url, "", False) == DATA + b"x"
