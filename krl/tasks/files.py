"""Files and hub data sets to rows: one reader of JSON, and one way of decoding what Arrow and `datasets` hold."""

import contextlib
import decimal
import glob
import gzip
import itertools
import json
import logging
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

Rows = Iterator[tuple[dict[str, Any], str]]  # each row as Python values, and the words that name it in messages

_KINDS = (".jsonl", ".json", ".parquet", ".arrow")
_OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # beside data, no rows
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # what the words in files' names may mean
_MEANT = {"training": "train", "testing": "test", "development": "dev", "evaluation": "eval"}
_BLANK = re.compile(r"[ \t\r\n]*")


class Literal(float):
    """A number of a JSON file that has a point or an exponent; as text it is what stands in the file.

    >>> Literal("2.50") + 1, str(Literal("2.50")), Literal("0.12345678901234567890").text
    (3.5, '2.50', '0.12345678901234567890')
    """

    text: str

    def __new__(cls, text: str) -> "Literal":
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


# ---------------------------------------------------------------- where the rows are


def read_rows(*, name: str, subset: str, split: str, path: str) -> tuple[Rows, str]:
    """Open a data set, see `krl.tasks.data.load_tasks` for the arguments.

    Returns:
        (the rows, read as they are asked for; the words that name the data set in messages).

    Raises:
        ValueError: the data set cannot be read or is empty; a row that cannot be read raises when it is asked for.
    """
    if path:
        files = find_files(path, subset=subset, split=split)
        source = f"data file {files[0]}" if len(files) == 1 else f"the {len(files)} data files of {path}"
        rows: Rows = itertools.chain.from_iterable(map(_read_file, files))
    else:
        source = f"data set {name}" + (f" ({subset})" if subset else "") + f", split {split}"
        rows = _read_hub(name, subset, split, source)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source} is empty; it needs a row for each prompt")
    return itertools.chain([first], rows), source


def find_files(path: str, *, subset: str = "", split: str = "train") -> list[pathlib.Path]:
    """The data files that a path means, in the order they are read.

    Args:
        path: a file, a directory, a pattern such as "data/part-*.jsonl", or several of these separated by commas. A
            file that is there is taken as it is, whatever its name.
        subset, split: of a directory with several: `subset` is a directory in it, and splits are told by the files'
            names (train-00000-of-00002.parquet, gsm8k_test.jsonl), by directories, or by what `save_to_disk` wrote.

    Raises:
        ValueError: nothing is there, or not for this split; a file has another ending; a file is named twice.
    """
    files = _find(path, subset, split or "train")
    twice = [file for number, file in enumerate(files) if file in files[:number]]
    if twice:
        raise ValueError(f"{path} names data file {twice[0]} twice; name it once")
    return files


def named_file(folder: pathlib.Path, name: str) -> str:
    """The path of a data set in a directory with several: a directory or data file of its name, .jsonl if none is."""
    choices = [folder / name, *(folder / f"{name}{ending}" for ending in (*_KINDS, ".jsonl.gz", ".json.gz"))]
    return str(next((one for one in choices if one.exists()), folder / f"{name}.jsonl"))


def has_split(path: str, *, subset: str = "", split: str) -> bool:
    """Whether a path is a directory that tells its splits apart and has this one."""
    folder = pathlib.Path(path)
    return bool(path) and bool(split) and folder.is_dir() and split in _splits(folder, subset, split)


def _find(path: str, subset: str, split: str) -> list[pathlib.Path]:
    place = pathlib.Path(path)
    if place.is_dir():
        return _in_directory(place, subset, split)
    if not place.exists() and "," in path:
        return [file for part in path.split(",") if part.strip() for file in _find(part.strip(), subset, split)]
    if not place.exists() and glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise ValueError(f"no data file matches {path}; check the pattern")
        return [file for one in found for file in _find(one, subset, split)]
    if _kind(place) not in _KINDS:
        raise ValueError(f"data file {place} must end in .jsonl, .json, .parquet or .arrow")
    if not place.is_file() or not os.access(place, os.R_OK):
        raise ValueError(f"data file {place} does not exist or cannot be read; check the path")
    return [place]


def _in_directory(folder: pathlib.Path, subset: str, split: str) -> list[pathlib.Path]:
    """The files of a split; all of them where the directory has no splits."""
    splits = _splits(folder, subset, split)
    if not splits:
        raise ValueError(f"the directory {folder} holds no .jsonl, .json, .parquet or .arrow files; check the path")
    if split not in splits and (len(splits) > 1 or next(iter(splits)) in _SPLITS):
        names = ", ".join(sorted(name or "files whose names tell none" for name in splits))
        raise ValueError(f"the directory {folder} has no split {split!r}, only {names}; name one, or the files")
    files = splits[split] if split in splits else next(iter(splits.values()))
    kinds = sorted({_kind(file) for file in files})
    if len(kinds) > 1:
        raise ValueError(f"the directory {folder} holds {' and '.join(kinds)} files; name those to read by a pattern")
    return files


def _splits(folder: pathlib.Path, subset: str, asked: str) -> dict[str, list[pathlib.Path]]:
    """The data files in a directory by their split; "" is that of files whose names tell none."""
    if subset and (folder / subset).is_dir():
        return _splits(folder / subset, "", asked)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():  # by Dataset.save_to_disk
        return {"": _saved_files(folder)}
    inside = sorted(one for one in folder.iterdir() if not one.name.startswith((".", "_")))
    files = [one for one in inside if one.is_file() and _kind(one) in _KINDS and one.name not in _OF_DATASETS]
    folders = [one for one in inside if one.is_dir()]
    if not files and folder / "data" in folders:
        return _splits(folder / "data", "", asked)
    splits: dict[str, list[pathlib.Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file, asked), []).append(file)
    for inner in folders if not files else ():
        split = _meant_split(inner.name, asked)
        if split in (asked, *_SPLITS):
            splits.setdefault(split, []).extend(file for some in _splits(inner, "", asked).values() for file in some)
    return {name: found for name, found in splits.items() if found}


def _saved_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of one split that Dataset.save_to_disk wrote."""
    file = folder / "state.json"
    try:
        return [folder / one["filename"] for one in _settings(file)["_data_files"]]
    except (KeyError, TypeError):
        raise ValueError(
            f"{file} does not list _data_files, as Dataset.save_to_disk writes them; name the data files instead"
        ) from None


def _split_of(file: pathlib.Path, asked: str) -> str:
    """The split that a file's name tells, "" if it tells none."""
    stem = file.name.removesuffix(".gz").removesuffix(_kind(file))
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", stem)
    if shard:  # as the hub and `datasets` name them
        last = _meant_split(shard[1].rpartition("-")[2], asked)
        if last == asked or shard[1].lower().endswith(f"-{asked.lower()}"):
            return asked
        return "" if shard[1] == "data" else _meant_split(shard[1], asked)
    words = "|".join((re.escape(asked), *_SPLITS, *_MEANT))
    word = re.search(rf"(?<![^-_.\s])({words})(?![^-_.\s])", stem, re.IGNORECASE)
    return _meant_split(word[1], asked) if word else ""


def _meant_split(word: str, asked: str) -> str:
    """The split that a word means, in whatever case; other words stay as they are."""
    small = word.lower()
    if asked.lower() == small:
        return asked
    return _MEANT.get(small, small if small in _SPLITS else word)


def _kind(file: pathlib.Path) -> str:
    """The ending that says how a file is read; JSON may also be compressed."""
    kind = pathlib.Path(file.name.removesuffix(".gz")).suffix
    return kind if kind in (".jsonl", ".json") else file.suffix


def _settings(file: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}; name the data files instead") from None


# ---------------------------------------------------------------- JSON


def _read_file(file: pathlib.Path) -> Rows:
    kind = _kind(file)
    return _read_json(file) if kind in (".jsonl", ".json") else _read_arrow(file, kind.removeprefix("."))


def _read_json(file: pathlib.Path) -> Rows:
    """An object on each line, or one array of them. Lines end with "\\n" alone: texts may hold U+2028."""
    opened = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opened(file, "rb") as lines:
            for line in lines:
                if not number:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put in front
                if not line.strip():
                    continue
                if not number and line.lstrip().startswith(b"["):
                    yield from _read_array(file, line + lines.read())
                    return
                try:
                    row = loads(line.decode())
                except (ValueError, RecursionError) as error:
                    raise _unreadable(file, number, error) from None
                yield _checked(row, file, number), f"row {number} of data file {file}"
                number += 1
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read data file {file} after {number} rows: {error}; make it again") from None


def _read_array(file: pathlib.Path, content: bytes) -> Rows:
    """The objects of one array, each with its number if it is broken."""
    text, number = content.decode(errors="surrogateescape"), 0
    at = _BLANK.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    while text[at : at + 1] != "]":
        try:
            row, end = _DECODER.raw_decode(text, at)
            text[at:end].encode()
        except (ValueError, RecursionError) as error:
            raise _unreadable(file, number, error) from None
        yield _checked(row, file, number), f"row {number} of data file {file}"
        at = _BLANK.match(text, end).end()  # type: ignore[union-attr]
        if text[at : at + 1] == ",":
            at = _BLANK.match(text, at + 1).end()  # type: ignore[union-attr]
        elif text[at : at + 1] != "]":
            raise _unreadable(file, number, ValueError("neither a comma nor ] stands behind it"))
        number += 1
    if text[at + 1 :].strip():
        raise ValueError(f"cannot read data file {file} as json: there is more behind its array; remove that")


def loads(text: str) -> Any:
    """A JSON value, its whole numbers exact and the others as `Literal`.

    Raises:
        ValueError: it is none, or a key is there twice.
    """
    return _DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _whole(digits: str) -> int:
    """Python refuses to read more than 4300 digits at a time, but not by way of a decimal number."""
    return int(digits) if len(digits) < 4000 else int(decimal.Decimal(digits))


class _Spelled(str):
    """A whole number as text, which looks like one in a list, too."""

    __slots__ = ()
    __repr__ = str.__str__


def spell_numbers(value: Any) -> Any:
    """A value in which whole numbers that Python refuses to write, of more than 4300 digits, are texts."""
    if isinstance(value, dict):
        return {name: spell_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [spell_numbers(inner) for inner in value]
    if isinstance(value, int) and value.bit_length() > 13000:  # 3914 digits or more
        return _Spelled(f"{decimal.Decimal(value):f}")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Literal, parse_int=_whole)


def _checked(row: object, file: pathlib.Path, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        reason = f"{type(row).__name__} instead of an object with the fields of a row"
        raise _unreadable(file, number, ValueError(reason))
    return row


def _unreadable(file: pathlib.Path, number: int, error: Exception) -> ValueError:
    reason = f"JSON parse error: {error}"
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        reason = f"JSON parse error: {error.msg} at {line}column {error.colno}"
    if isinstance(error, UnicodeError):
        reason = "it is not UTF-8"
    if isinstance(error, RecursionError):
        reason = "its lists and objects are nested too deeply"
    return ValueError(f"cannot read data file {file} as json, row {number}: {reason}; mend or remove that row")


# ---------------------------------------------------------------- Arrow and the hub


def _read_arrow(file: pathlib.Path, kind: str) -> Rows:
    """The rows of a .parquet file, or of an .arrow file in either of Arrow's formats."""
    import pyarrow.ipc  # slow to import, and JSON does without
    import pyarrow.parquet

    source = f"data file {file}"
    if not file.stat().st_size:
        return
    try:
        with pyarrow.OSFile(str(file)) as opened:
            if kind == "parquet":
                parquet = pyarrow.parquet.ParquetFile(opened)
                schema, batches = parquet.schema_arrow, parquet.iter_batches(batch_size=1000)
            else:
                stream = _open_arrow(opened, pyarrow.ipc)
                schema, batches = stream.schema, stream
            twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
            if twice is not None:
                raise _RowError(f"{source} has two columns named {twice!r}; rename or remove one")
            tables = (pyarrow.Table.from_batches([batch], schema) for batch in batches)
            yield from _decode(tables, _features(schema), source)
    except _RowError:
        raise
    except Exception as error:  # the libraries raise many unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {source} as {kind}: {reason}; see that it is what its name says") from None


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` takes the columns of an Arrow schema for; columns of types that it lacks (map) are left out."""
    import datasets
    import pyarrow

    features: dict[str, Any] = {}
    for field in schema:
        with contextlib.suppress(ValueError, TypeError):
            features |= datasets.Features.from_arrow_schema(pyarrow.schema([field], schema.metadata))
    return features


def _open_arrow(opened: Any, ipc: ModuleType) -> Any:
    """The record batches of a stream, which `datasets` writes, or of a file of Arrow's other format."""
    if opened.read(6) == b"ARROW1":
        reader = ipc.open_file(opened)
        return reader.read_all().to_reader(max_chunksize=1000)
    opened.seek(0)
    return ipc.open_stream(opened)


def _read_hub(name: str, subset: str, split: str, source: str) -> Rows:
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells every try of a hub that is out of reach
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it tells what is raised too
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it reports to the hub, even of local files
    try:
        data = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the hub's client raises many unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load {source}: {reason}; name a local file instead") from None
    yield from _decode(data.with_format("arrow").iter(batch_size=1000), data.features, source)


class _RowError(ValueError):
    """A row or a column that is wrong; says which."""


def _decode(tables: Iterable[Any], features: Mapping[str, Any], source: str) -> Rows:
    """Rows of Arrow tables as `datasets` yields them, many times faster than one by one.

    Its type Json is decoded by the reader of JSON, which keeps all digits, and numbers of 16 or 32 bits are the
    shortest ones that they stand for. A map is a dict. Images and sounds stay as they are stored: no field of a task
    can be one.
    """
    stored = [name for name, feature in features.items() if re.search(r"Json\(|float(16|32)", repr(feature))]
    number = 0
    for table in tables:
        try:
            rows = table.to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError:
            first = number + _first_unreadable(table)
            raise _RowError(f"row {first} of {source} is not UTF-8; mend or remove it") from None
        for row in rows:
            at = f"row {number} of {source}"
            try:
                for name in stored:
                    row[name] = _meant(features[name], row[name])
            except ValueError as error:
                raise _RowError(f"{at}: {name!r} is no JSON: {error}; mend or remove the row") from None
            yield row, at
            number += 1


def _meant(feature: Any, value: Any) -> Any:
    """A value as stored -> what it stands for."""
    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: _meant(inner, value.get(name)) for name, inner in feature.items()}
    if isinstance(feature, list) or hasattr(feature, "feature"):
        inner = feature[0] if isinstance(feature, list) else feature.feature
        return [_meant(inner, item) for item in value]
    if type(feature).__name__ == "Json":
        return loads(value)
    if getattr(feature, "dtype", "") in ("float16", "float32"):
        return float(str(np.dtype(feature.dtype).type(value)))  # 0.1, and not 0.10000000149011612
    return value


def _first_unreadable(table: Any) -> int:
    """The first row of an Arrow table whose texts are not UTF-8."""
    for number in range(len(table)):
        try:
            table.slice(number, 1).to_pylist()
        except UnicodeDecodeError:
            return number
    return 0
