"""The training images of a model, as trainers keep them, with their captions.

Read are a folder of images with a caption file beside each (``.txt`` or ``.caption``), also as kohya's trainers want it, in
folders such as ``10_name`` for ten repeats; Hugging Face's image folder with ``metadata.jsonl`` or ``metadata.csv``; and
webdataset's tar files. A folder may mix them.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from PIL import Image

from ..files import ContentError, parse_json, path_inside, read_whole
from ..fingerprint import content_hash
from ..pictures import MAX_FILE, decoded
from ..prompts import COLUMNS, MAX_LINE, PromptListError, stream_prompts
from . import AuditError
from .captions import notes
from .dataset import counted

#: Suffixes of training images.
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
#: The formats that these are in.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
#: Suffixes of a caption beside its image, in the order in which they are tried.
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
#: What a tar file is called that is compressed, so that its members cannot be read one by one.
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class TrainingError(AuditError):
    """A training folder that cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """An image of a training folder.

    Attributes:
        name: relative to the folder; of a member of a tar file, that file's name and the member's.
        caption: what it was trained with; ``None`` if there is none.
        repeats: how often kohya's trainers show it in an epoch.
        file: where its bytes are, from ``start``, ``size`` of them; the whole file if ``size`` is ``None``.
    """

    name: str
    file: Path
    caption: str | None = None
    repeats: int = 1
    start: int = 0
    size: int | None = None

    def open(self) -> Image.Image:
        """The image, decoded.

        Raises:
            TrainingError: if it cannot be read.
        """
        try:
            if self.size is None:
                content = read_whole(self.file, MAX_FILE)
            else:
                with open(self.file, "rb") as stream:
                    stream.seek(self.start)
                    content = stream.read(self.size)
            with decoded(content, self.name, FORMATS) as image:
                return image.convert("RGB")
        except ContentError as error:
            raise TrainingError(f"training image {error}; mend it or take it out of the folder") from None
        except OSError as error:
            raise TrainingError(f"training image {self.name} cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class TrainingSet:
    """A training folder.

    Attributes:
        folder: where it is.
        images: in the order of their names.
        formats: what it was read as.
        named_by_folder: images whose caption is the name of their folder, as kohya's trainers take it.
        key: a hash of names, captions, sizes and times of the files.
    """

    folder: Path
    images: tuple[TrainingImage, ...]
    formats: tuple[str, ...]
    named_by_folder: int
    key: str

    @property
    def captions(self) -> dict[str, list[int]]:
        """Every different caption, with the numbers of the images that have it, in the order of the images."""
        found: dict[str, list[int]] = {}
        for number, image in enumerate(self.images):
            if image.caption is not None:
                found.setdefault(image.caption, []).append(number)
        return found

    def prompt_list(self) -> str:
        """The different captions as a prompt list (``.jsonl``), a line each."""
        return "".join(json.dumps({"caption": caption}) + "\n" for caption in self.captions)

    def notes(self) -> list[str]:
        """What a reader of the report has to know of the captions, in sentences."""
        return notes(self.images, self.captions, self.named_by_folder)


def read_training(folder: str | os.PathLike[str], column: str | None = None) -> TrainingSet:
    """Reads a training folder. Images are not decoded yet.

    Hidden files and folders are passed over. Links to folders are not followed: within the folder they would count twice.

    Args:
        folder: as the module says.
        column: key or column of the captions in metadata; if not given, ``caption``, ``prompt`` or ``text``.

    Raises:
        FileNotFoundError: if there is no such folder.
        TrainingError: if it holds no image, no caption, a link or a name that leads out of it, or a file that cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no training folder at {root}")
    root = root.resolve()
    found = _Files.of(root)
    by_metadata: dict[Path, str] = {}
    for file in found.metadata:
        by_metadata |= _from_metadata(root, file, column, by_metadata)
    images, formats, named = [], Counter[str](), 0
    for file in found.images:
        image, way = _captioned(root, file, by_metadata)
        formats[way] += 1
        named += way == _FOLDER_NAME
        by_metadata.pop(file.resolve(), None)
        images.append(image)
    for file in by_metadata:
        raise TrainingError(f"{_shown(root, file)} has a caption in the metadata, and is hidden: take the dot off its name")
    for file in found.tars:
        members = list(_from_tar(root, file, column))
        formats["webdataset"] += len(members)
        images += members
    if not images:
        raise TrainingError(
            f"{root} holds no image ({', '.join(sorted(SUFFIXES))}) and no .tar: give the folder of training images"
        )
    if all(image.caption is None for image in images):
        raise TrainingError(
            f"{root} holds {counted(len(images), 'image')} and no caption: put a .txt beside each image, a metadata.jsonl "
            "with file_name and text, or a folder's name such as 10_name around them"
        )
    formats.pop(_BARE, None)
    return TrainingSet(root, tuple(images), tuple(sorted(formats)), named, _key(root, images))


_METADATA_WAY, _CAPTION_FILES, _FOLDER_NAME, _BARE = "metadata", "caption files", "folder names", "none"
#: kohya's name of a folder of images: how often each is repeated, and what they show.
_REPEATED = re.compile(r"([0-9]{1,6})_(.*\S.*)", re.DOTALL)


@dataclass
class _Files:
    """The files of a training folder by what they are."""

    images: list[Path]
    metadata: list[Path]
    tars: list[Path]

    @classmethod
    def of(cls, root: Path) -> _Files:
        found = cls([], [], [])
        for place, folders, names in os.walk(root, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in folders:
                if (path := Path(place, name)).is_symlink():
                    _inside(root, path)
            for name in sorted(names):
                path = Path(place, name)
                kind = path.suffix.lower()
                if name.startswith("."):
                    continue
                if name.lower().endswith(_COMPRESSED):
                    raise TrainingError(
                        f"{_shown(root, path)} is compressed, so its images cannot be read one by one: unpack it"
                    )
                group = (
                    found.images
                    if kind in SUFFIXES
                    else found.metadata
                    if name.lower() in METADATA
                    else found.tars
                    if kind == ".tar"
                    else None
                )
                if group is not None:
                    _inside(root, path)
                    group.append(path)
        return found


def _raise(error: OSError) -> None:
    raise TrainingError(f"{error.filename} cannot be read: {error.strerror}")


def _inside(root: Path, path: Path) -> None:
    """Refuses a link that leads out of the folder, or to nothing."""
    if path.is_symlink():
        try:
            inside = path.resolve(strict=True).is_relative_to(root)
        except (OSError, RuntimeError):
            raise TrainingError(
                f"{_shown(root, path)} is a link that leads nowhere: put the file there, or take it out"
            ) from None
        if not inside:
            raise TrainingError(f"{_shown(root, path)} is a link that leads out of the folder: put the file itself there")


def _shown(root: Path, path: Path) -> str:
    """A file's name as text, relative to the folder. Bytes that are no UTF-8 become U+FFFD."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")


def _from_metadata(root: Path, file: Path, column: str | None, known: dict[Path, str]) -> dict[Path, str]:
    """The captions of Hugging Face's metadata, by image."""
    captions: dict[Path, str] = {}
    try:
        for listed in stream_prompts(file, column):
            where = f"{_shown(root, file)}, line {listed.line}"
            if len(listed.images) != 1:
                raise TrainingError(f"{where}: no image under the key 'file_name'")
            try:
                image = path_inside(root, str(file.parent.relative_to(root) / listed.images[0]))
            except ValueError as error:
                raise TrainingError(f"{where}: {error}") from None
            if not image.is_file():
                raise TrainingError(f"{where}: there is no image {listed.images[0]!r:.200}")
            if image.suffix.lower() not in SUFFIXES:
                raise TrainingError(f"{where}: {listed.images[0]!r:.200} is no image ({', '.join(sorted(SUFFIXES))})")
            if image in captions or image in known:
                raise TrainingError(f"{where}: {listed.images[0]!r:.200} has a caption already")
            captions[image] = listed.text
    except PromptListError as error:
        raise TrainingError(str(error)) from None
    return captions


def _captioned(root: Path, file: Path, by_metadata: dict[Path, str]) -> tuple[TrainingImage, str]:
    """An image file with its caption, and where that stood."""
    repeated = _REPEATED.fullmatch(os.fsencode(file.parent.name).decode("utf-8", "replace"))
    in_folder = repeated if file.parent != root else None
    image = TrainingImage(_shown(root, file), file, repeats=max(1, int(in_folder[1])) if in_folder else 1)
    if (caption := by_metadata.get(file.resolve())) is not None:
        return replace(image, caption=caption), _METADATA_WAY
    for suffix in CAPTIONS:
        beside = file.with_suffix(suffix)
        _inside(root, beside)
        if beside.is_file() and (caption := _first_line(_text(root, beside), _shown(root, beside))):
            return replace(image, caption=caption), _CAPTION_FILES
    if in_folder:
        return replace(image, caption=in_folder[2].strip()), _FOLDER_NAME
    return image, _BARE


def _text(root: Path, file: Path) -> bytes:
    try:
        return read_whole(file, MAX_LINE)
    except ContentError:
        raise TrainingError(
            f"{_shown(root, file)} is larger than {MAX_LINE >> 20} MB: a caption file holds one caption"
        ) from None
    except OSError as error:
        raise TrainingError(f"{_shown(root, file)} cannot be read: {error.strerror}") from None


def _first_line(content: bytes, name: str) -> str | None:
    """The first line that is not blank, which is what kohya's trainers take; ``None`` if all are."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise TrainingError(f"{name} is not UTF-8 text: save it as UTF-8") from None
    return next((line.strip() for line in lines if line.strip()), None)


class _Limited:
    """A tar file whose headers are read within a limit; those of PAX and GNU hold texts of any length."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_LINE:
            raise tarfile.ReadError("a header is too large")
        return self._stream.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _from_tar(root: Path, file: Path, column: str | None) -> Iterator[TrainingImage]:
    """The images of a webdataset shard. What has the same name up to the first dot of its last part belongs together."""
    shard = _shown(root, file)
    waiting: dict[str, str] = {}
    images: dict[str, TrainingImage] = {}
    try:
        with open(file, "rb") as stream, tarfile.open(fileobj=_Limited(stream), mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                name = _member_name(member.name)
                path = PurePosixPath(name)
                if not member.isreg() or path.name.startswith("."):
                    continue
                stem, _, kind = path.name.partition(".")
                group, kind = f"{path.parent}/{stem}", f".{kind.lower()}"
                where = f"{shard}/{name}"
                if kind in SUFFIXES:
                    if member.size > MAX_FILE:
                        raise TrainingError(f"{where} is larger than {MAX_FILE >> 20} MB, so it is no image to be read")
                    if group in images:
                        raise TrainingError(f"{where}: there is another image of that name in {shard}")
                    images[group] = TrainingImage(where, file, start=member.offset_data, size=member.size)
                elif kind in (".txt", ".caption", ".json"):
                    if member.size > MAX_LINE:
                        raise TrainingError(f"{where} is larger than {MAX_LINE >> 20} MB: it is to hold one caption")
                    stream.seek(member.offset_data)
                    content = stream.read(member.size)
                    caption = _of_json(content, where, column) if kind == ".json" else _first_line(content, where)
                    # A caption in a text of its own goes before one among other values.
                    if caption and (kind != ".json" or group not in waiting):
                        waiting[group] = caption
            # The library takes a damaged header, or the end of a file that was cut off, for the end of the members.
            stream.seek(tar.offset)
            if (mark := stream.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged at byte {tar.offset:,}" if mark else "its end is missing")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(f"{shard} cannot be read as a tar file: {error}") from None
    if not images:
        raise TrainingError(f"{shard} holds no image ({', '.join(sorted(SUFFIXES))}): take it out of the folder")
    for group, image in images.items():
        yield replace(image, caption=waiting.get(group))


def _member_name(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def _of_json(content: bytes, where: str, column: str | None) -> str | None:
    try:
        values = parse_json(content)
    except ContentError as error:
        raise TrainingError(f"{where}: {error}") from None
    keys = (column,) if column else COLUMNS
    text = next((values[key] for key in keys if isinstance(values.get(key), str)), "") if isinstance(values, dict) else ""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TrainingError(f"{where}: the caption holds half a character (a lone surrogate)") from None
    return text.strip() or None


def _key(root: Path, images: Sequence[TrainingImage]) -> str:
    about = {file: os.stat(file) for file in dict.fromkeys(image.file for image in images)}
    return content_hash(
        [
            [image.name, image.caption, image.start, about[image.file].st_size, about[image.file].st_mtime_ns]
            for image in images
        ]
    )
