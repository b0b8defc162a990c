"""Sound files of any format that libsndfile knows, told by their content alone and opened whatever their names are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.files import RefusedFile, open_file

MAX_BYTES = 2**36


@contextmanager
def open_sound(path: str | Path) -> Iterator[Any]:
    """A sound file as a `soundfile.SoundFile`.

    RefusedFile, in a few words, where it is none, or where its samples turn out to be damaged in the block; OSError
    where it cannot be opened.
    """
    import soundfile  # half a second to import, and only needed here

    with open_file(path, MAX_BYTES) as file:
        try:
            # By its descriptor: of a name it would take the suffix for the format, and not all names could be encoded.
            with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
                yield sound
        except soundfile.LibsndfileError as error:
            raise RefusedFile(error.error_string.removeprefix("Error : ").strip().rstrip(".")) from None
