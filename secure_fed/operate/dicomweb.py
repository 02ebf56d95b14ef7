"""An image archive over DICOMweb: which images a query finds, and each as the bytes of a file.

Only searches (QIDO-RS) and retrievals (WADO-RS) are sent, to the one address given: no redirect is followed, and proxy
and passwords of the environment are not looked at. Answers are not believed: what does not match the query, or is
another image than the one asked for, or stops before its end, is not taken.
"""

from __future__ import annotations

import fnmatch
import io
import ipaddress
import re
import ssl
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pydicom
import requests
from dicomweb_client import DICOMwebClient
from pydicom.datadict import tag_for_keyword
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from secure_fed.clients.dicom_header import NO_PICTURES
from secure_fed.clients.patients import in_one_form
from secure_fed.core.errors import CertificateError, KeyFileError, PacsError
from secure_fed.transport.connection import without_password

STUDY_KEYS = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate", "StudyTime"),
    *("StudyID", "StudyDescription", "StudyInstanceUID", "ModalitiesInStudy", "ReferringPhysicianName"),
)
SERIES_KEYS = ("Modality", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber", "BodyPartExamined", "ProtocolName")

TIMEOUT = (10.0, 120.0)
"""Seconds to connect, and between two pieces of an answer."""

MOST_FOUND = 2**27
"""Bytes of the answer to one search, on all its pages."""

MOST_BESIDE = 2**26
"""Bytes that an image's file may have beside twice what its pixels were announced to take."""

MOST_UNANNOUNCED = 2**31
"""Bytes of the file of an image whose size the archive does not tell."""

_PIECE = 2**20
_ATTEMPTS = 3
_BUSY = (429, 503, 504)
_UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")
_RANGE = re.compile(r"(\d*)-(\d*)")

Tell = Callable[[int, int], None]


class NotFetchedError(PacsError):
    """One image that the archive has listed and does not give; others may come."""


class _BrokenOffError(PacsError):
    """A transfer that stopped before its end."""


@dataclass(frozen=True, slots=True)
class PacsImage:
    """An image that an archive lists.

    Attributes:
        study: StudyInstanceUID.
        series: SeriesInstanceUID.
        uid: SOPInstanceUID.
        patient: PatientID; empty if the archive has none.
        accession: AccessionNumber of its study; may be empty.
        modality: of its series; may be empty.
        number: InstanceNumber; may be empty.
        size: bytes of its pixels if they are not compressed; None if the archive does not tell.
    """

    study: str
    series: str
    uid: str
    patient: str
    accession: str
    modality: str
    number: str
    size: int | None


@dataclass(frozen=True)
class Found:
    """What a query found.

    Attributes:
        images: sorted by study, series and uid.
        left_out: series that hold no pictures, counted by modality.
        ignored: for keys of the query that the archive did not heed, how many of its answers did not match; these are
            not among the images.
        unpaged: whether the archive gave everything at once, heedless of pages.
    """

    images: tuple[PacsImage, ...]
    left_out: dict[str, int]
    ignored: dict[str, int]
    unpaged: bool


def parse_query(terms: Sequence[str]) -> dict[str, str]:
    """A query from ``KEYWORD=VALUE`` terms.

    Raises:
        ValueError: a term is none, its keyword is unknown or there twice, or its value is empty.
    """
    query: dict[str, str] = {}
    for term in terms:
        key, separator, value = term.partition("=")
        key, value = key.strip(), value.strip()
        if not separator or not value:
            raise ValueError(f"{term!r}: expected KEYWORD=VALUE, as in PatientID=4711 or StudyDate=20240101-20241231")
        if key not in STUDY_KEYS + SERIES_KEYS:
            raise ValueError(f"{key!r}: expected one of {', '.join(STUDY_KEYS + SERIES_KEYS)}")
        if key in query:
            raise ValueError(f"{key} is there twice; expected one value, which may have * and ? in it")
        query[key] = value
    return query


class Pacs:
    """One archive.

    Args:
        url: of its DICOMweb service, such as ``https://pacs.example.org/dicom-web``.
        token: sent as ``Authorization: Bearer``, or with its own scheme if it has one (``Basic ...``); never shown.
        authority: certificates that are trusted instead of the system's, PEM.
        proxy: HTTP proxy on the way; none if not given.
        rate: most requests a second.
        patience: seconds to wait before a busy archive is asked once more; doubled each time.

    Raises:
        PacsError: the URL is none, has a password in it, or would carry a token in clear.
        CertificateError: ``authority`` holds no certificate.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        authority: Path | None = None,
        proxy: str | None = None,
        rate: float = 20.0,
        patience: float = 1.0,
    ) -> None:
        self.url = url.rstrip("/")
        _check_url(self.url, token)
        session = requests.Session()
        session.trust_env = False  # else .netrc replaces the token, and variables name proxies
        session.headers.update({"User-Agent": "secfacmic"})
        if token is not None:
            session.headers["Authorization"] = token if " " in token else f"Bearer {token}"
        if authority is not None:
            _check_authority(authority)
            session.verify = str(authority)
        session.mount("http://", _Paced(rate, patience))
        session.mount("https://", _Paced(rate, patience))
        self._patience = patience
        self._proxy = None if proxy is None else without_password(proxy)
        self._more = False
        self._most = MOST_FOUND
        try:
            self._client = DICOMwebClient(
                self.url,
                session=session,
                proxies=None if proxy is None else {"http": proxy, "https": proxy},
                callback=self._examine,
                timeout=TIMEOUT,
            )
        except ValueError as error:
            raise PacsError(
                f"{self.url}: no URL of a DICOMweb service; expected one like https://pacs.example.org/dicom-web"
            ) from error
        self._client.set_http_retry_params(retry=False)  # _Paced tries again, for as long as the archive asks

    def search(self, queries: Sequence[Mapping[str, str]], tell: Tell = lambda done, total: None) -> Found:
        """All images of the series that match one of several queries.

        Args:
            queries: each from keyword to value, with keywords of ``STUDY_KEYS`` and ``SERIES_KEYS``.
            tell: is told how many searches are done, of how many known so far.

        Raises:
            PacsError: the archive cannot be asked, answers with something else, or does not page.
            CertificateError: it does not prove to be the one meant.
        """
        ignored: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        images: dict[str, PacsImage] = {}
        unpaged = False
        done = 0
        studies: dict[str, tuple[dict[str, Any], Mapping[str, str]]] = {}
        for query in queries:
            terms = {key: value for key, value in query.items() if key in STUDY_KEYS}
            if "Modality" in query and "ModalitiesInStudy" not in query:
                terms["ModalitiesInStudy"] = query["Modality"]
            results, whole = self._pages("studies", terms, ("AccessionNumber", "PatientID", *terms))
            unpaged |= whole
            for result in _matching(results, terms, ignored):
                studies[_uid(result, "StudyInstanceUID")] = (result, query)
            done += 1
            tell(done, len(queries) + len(studies))
        for study, (of_study, query) in sorted(studies.items()):
            terms = {key: value for key, value in query.items() if key in SERIES_KEYS}
            results, whole = self._pages("series", terms, ("Modality", *terms), study)
            unpaged |= whole
            for result in _matching(results, terms, ignored):
                modality = _text(result, "Modality")
                if modality in NO_PICTURES:
                    left_out[modality] += 1
                    continue
                series = _uid(result, "SeriesInstanceUID")
                count = _text(result, "NumberOfSeriesRelatedInstances")
                entries, whole = self._pages("instances", {}, _SIZE, study, series, count=count)
                unpaged |= whole
                for entry in entries:
                    image = _image(study, series, of_study, modality, entry)
                    first = images.setdefault(image.uid, image)
                    if (first.study, first.series) != (study, series):
                        raise PacsError(
                            f"{self.url}: lists image {image.uid} in series {first.series} and in {series}; expected "
                            "it in one: ask the archive's operators"
                        )
            done += 1
            tell(done, len(queries) + len(studies))
        ordered = sorted(images.values(), key=lambda image: (image.study, image.series, image.uid))
        return Found(tuple(ordered), dict(left_out), dict(ignored), unpaged)

    def retrieve(self, image: PacsImage) -> bytes:
        """The file of an image, in whatever transfer syntax the archive keeps it.

        Raises:
            NotFetchedError: it does not come, comes broken, or another one comes; other images may.
            PacsError: the archive cannot be asked.
            CertificateError: it does not prove to be the one meant.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._file(image)
            except _BrokenOffError as error:
                if attempt == _ATTEMPTS:
                    raise NotFetchedError(
                        f"image {image.uid}: broken off {_ATTEMPTS} times; expected a whole file: run the same "
                        "command again, and ask the archive's operators if it stays so"
                    ) from error
                time.sleep(self._patience * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _file(self, image: PacsImage) -> bytes:
        with self._asking(f"image {image.uid}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file that comes without its envelope is one all the same
            self._most = MOST_UNANNOUNCED if image.size is None else 2 * image.size + MOST_BESIDE
            try:
                dataset = self._client.retrieve_instance(image.study, image.series, image.uid)
                found = {key: in_one_form(str(dataset.get(key) or "")) for key in _IDENTITY}
                content = io.BytesIO()
                pydicom.dcmwrite(content, dataset, enforce_file_format=True)
            except (requests.RequestException, PacsError):
                raise
            except Exception as error:  # pydicom raises of every kind on broken files
                raise NotFetchedError(
                    f"image {image.uid}: what came is no DICOM file ({_short(error)}); ask the archive's operators"
                ) from error
        for (key, value), expected in zip(
            found.items(), (image.uid, image.series, image.study, image.patient), strict=True
        ):
            if value != expected:
                raise NotFetchedError(
                    f"image {image.uid}: the file that came has {key} {value!r}, and the search told "
                    f"{expected!r}; expected the same in both, so it was not kept: ask the archive's operators"
                )
        return content.getvalue()

    def _pages(
        self, level: str, terms: Mapping[str, str], fields: Sequence[str], *place: str, count: str = ""
    ) -> tuple[list[dict[str, Any]], bool]:
        """All results of one search, and whether the archive gave them all at once, heedless of pages.

        Pages are asked for until one is empty, or there are as many results as the archive has told before.
        """
        key = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}[level]
        search = getattr(self._client, f"search_for_{level}")
        results: dict[str, dict[str, Any]] = {}
        offset = 0
        self._more = False
        self._most = MOST_FOUND
        while True:
            with self._asking(f"a search for {level}"):
                try:
                    # No limit: Orthanc 1.10 cuts by it before it filters by modality, and then says there is no more.
                    page = search(*place, offset=offset or None, fields=sorted(set(fields)), search_filters=dict(terms))
                except (ValueError, RecursionError) as error:  # what is no UTF-8, no JSON, or nested without end
                    raise PacsError(f"{self.url}: the answer to a search is no JSON; {_ADDRESS}") from error
            if not isinstance(page, list) or not all(isinstance(result, dict) for result in page):
                raise PacsError(f"{self.url}: the answer to a search is no list of results; {_ADDRESS}")
            fresh = {uid: result for result in page if (uid := _uid(result, key)) not in results}
            results.update(fresh)
            if not page or count == str(len(results)):
                return list(results.values()), False
            if not fresh:
                if self._more:
                    raise PacsError(
                        f"{self.url}: the archive says that there are more {level}, and gave the same {len(page)} "
                        "again when it was asked for those: it ignores pages; expected others: narrow the query "
                        "(StudyDate, Modality) below that number"
                    )
                return list(results.values()), True
            offset += len(page)

    def _examine(self, response: requests.Response, *_: Any, **__: Any) -> requests.Response:
        """Hear an answer before the client does: what it cannot be, and whether it is whole.

        The client takes a message that stops early for a short one.
        """
        asked = str(response.request.headers.get("Accept", ""))
        image = "multipart" in asked
        status, kind = response.status_code, response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if response.is_redirect or 300 <= status < 400:
            target = without_password(response.headers.get("Location", "nowhere").partition("?")[0])
            raise PacsError(
                f"{self.url}: redirects to {target}; expected an answer, since a query goes to nobody else: if that is "
                "the archive, give its URL with --dicomweb"
            )
        if status in (401, 403):
            raise PacsError(
                f"{self.url}: answers {status} {response.reason}: it does not let this in; expected a token that it "
                "takes: look at --token-file (or SECFACMIC_DICOMWEB_TOKEN), whether it has run out, and at what the "
                "account may read"
            )
        if status == 407:
            raise PacsError(f"{self._proxy}: the proxy asks for a password; expected http://USER:PASSWORD@HOST:PORT")
        if status == 404 and not image:
            raise PacsError(f"{self.url}: answers 404, not found; {_ADDRESS}")
        if status in _BUSY:
            raise PacsError(
                f"{self.url}: answers {status} {response.reason} again and again: it is busy; run the same command "
                "later, or with a smaller --rate"
            )
        if status >= 400:
            problem = f"answers {status} {response.reason}"
            if image:
                raise NotFetchedError(f"the archive {problem}; ask its operators")
            raise PacsError(f"{self.url}: {problem} to a search; expected results: {_ADDRESS}")
        if image and kind not in ("multipart/related", "application/dicom"):
            raise NotFetchedError(f"{kind or 'something unnamed'} came; expected DICOM: ask the archive's operators")
        if not image and status != 204 and kind not in ("application/dicom+json", "application/json"):
            raise PacsError(f"{self.url}: {kind or 'something unnamed'} came; expected DICOM JSON: {_ADDRESS}")
        self._read(response, image)
        if image:
            boundary = re.search(r"boundary=\"?([^\";]+)", response.headers.get("Content-Type", ""))
            if boundary is not None and f"--{boundary[1].strip()}--".encode() not in response.content[-1000:]:
                raise _BrokenOffError("the answer has no end")
        self._more |= response.headers.get("Warning", "").startswith("299")
        return response

    def _read(self, response: requests.Response, image: bool) -> None:
        """Take in an answer, unpacked, which may be no longer than was announced, whatever its headers say."""
        pieces, size = [], 0
        for piece in response.iter_content(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > self._most:
                response.close()
                if image:
                    raise NotFetchedError(
                        f"more than {self._most:,} bytes came, which is more than the search announced; expected a "
                        "file of the size that Rows, Columns and NumberOfFrames say: ask the archive's operators"
                    )
                raise PacsError(
                    f"{self.url}: the answers to a search have more than {MOST_FOUND:,} bytes; expected fewer: narrow "
                    "the query (StudyDate, Modality)"
                )
        if not image:  # the next page has what is left
            self._most -= size
        response._content = b"".join(pieces)  # where requests itself keeps what it has read

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turn what can go wrong on the way into refusals."""
        try:
            yield
        except NotFetchedError as error:
            text = str(error)
            raise (error if text.startswith(what) else NotFetchedError(f"{what}: {text}")) from error
        except requests.exceptions.SSLError as error:
            raise CertificateError(
                f"{self.url}: the archive does not prove to be the one meant ({_reason(error)}); expected a "
                "certificate for this name, issued by somebody trusted here: name the authority's with --ca FILE"
            ) from error
        except requests.exceptions.ProxyError as error:
            raise PacsError(
                f"{self._proxy}: the proxy does not lead to {self.url} ({_reason(error)}); look at --proxy, or leave "
                "it out where the archive is reached directly"
            ) from error
        except requests.exceptions.ConnectTimeout as error:
            raise PacsError(self._unreached(error)) from error
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError) as error:
            raise _BrokenOffError(
                f"{self.url}: {what} was broken off ({_reason(error)}); expected a whole answer: run the same command "
                "again"
            ) from error
        except requests.exceptions.Timeout as error:
            raise PacsError(
                f"{self.url}: no answer to {what} for {TIMEOUT[1]:.0f} s; expected one: run the same command later, or "
                "narrow the query"
            ) from error
        except requests.exceptions.ConnectionError as error:
            raise PacsError(self._unreached(error)) from error
        except requests.exceptions.RequestException as error:
            raise PacsError(f"{self.url}: cannot be asked for {what} ({_reason(error)}); {_ADDRESS}") from error

    def _unreached(self, error: Exception) -> str:
        return (
            f"{self.url}: cannot be reached ({_reason(error)}); expected a DICOMweb service: look at host, port and "
            "firewall, and at --proxy if one is needed"
        )


_ADDRESS = "look at --dicomweb: it must be the root of the DICOMweb service, to which /studies is added"
_IDENTITY = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID")
"""Of a file: a label hangs on its study as on its patient."""

_SIZE = ("Rows", "Columns", "BitsAllocated", "NumberOfFrames", "SamplesPerPixel", "InstanceNumber")


class _Paced(HTTPAdapter):
    """No more than so many requests a second; a busy archive is asked again when it says, or ever later."""

    def __init__(self, rate: float, patience: float) -> None:
        retry = Retry(
            total=5,
            connect=1,
            read=1,
            other=0,
            redirect=0,
            status=4,
            status_forcelist=_BUSY,
            raise_on_status=False,
            backoff_factor=patience,
            retry_after_max=60,
        )
        super().__init__(max_retries=retry)
        self._pause, self._next = 1 / rate, 0.0

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        """Send a request when it is its turn."""
        # Orthanc 1.10 does not decode queries, and the client encodes more than it has to.
        request.url = (request.url or "").replace("%2A", "*").replace("%3F", "?")
        now = time.monotonic()
        time.sleep(max(0.0, self._next - now))
        self._next = max(now, self._next) + self._pause
        return super().send(request, *arguments, **options)


def _check_url(url: str, token: str | None) -> None:
    parts = urlsplit(url)
    try:
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
        _ = parts.port
    except ValueError:
        fits = False
    if not fits:
        raise PacsError(f"{without_password(url)!r}: no URL; expected one like https://pacs.example.org/dicom-web")
    if "@" in parts.netloc:
        raise PacsError(
            f"{without_password(url)}: the URL has a user or password in it, which ends up in logs; expected it in a "
            "file: --token-file FILE, with Basic and the base64 of USER:PASSWORD in it"
        )
    if token is not None and parts.scheme == "http" and not _is_here(parts.hostname or ""):
        raise PacsError(
            f"{url}: the token would go in clear over http, for everybody on the way to take; expected an https URL"
        )
    if token is not None and (not token.isascii() or not token.isprintable()):
        raise KeyFileError("the token has characters that no token has; expected one line of plain letters")


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_authority(authority: Path) -> None:
    try:
        ssl.create_default_context(cafile=authority)
    except OSError as error:  # ssl's errors among them
        raise CertificateError(
            f"{authority}: no certificates can be read ({error.strerror or _short(error)}); expected the authority's, "
            "PEM"
        ) from error


def _value(result: Mapping[str, Any], keyword: str) -> list[str]:
    """The values of an attribute in DICOM JSON, as text; empty if it is not there."""
    tag = tag_for_keyword(keyword)
    assert tag is not None
    entry = result.get(f"{tag:08X}")
    values = entry.get("Value") if isinstance(entry, dict) else None
    if not isinstance(values, list):
        return []
    names = [value.get("Alphabetic", "") if isinstance(value, dict) else value for value in values]
    return [in_one_form(str(name)) for name in names if name is not None]


def _text(result: Mapping[str, Any], keyword: str) -> str:
    return next(iter(_value(result, keyword)), "")


def _uid(result: Mapping[str, Any], keyword: str) -> str:
    """An identifier, which becomes a part of a file's name."""
    uid = _text(result, keyword)
    if _UID.fullmatch(uid) is None:
        raise PacsError(
            f"a result of the archive has {keyword} {uid[:70]!r}; expected digits and dots between: ask the "
            "archive's operators"
        )
    return uid


def _image(study: str, series: str, of_study: Mapping[str, Any], modality: str, result: Mapping[str, Any]) -> PacsImage:
    sides = [_text(result, key) for key in ("Rows", "Columns", "BitsAllocated")]
    more = [_text(result, key) or "1" for key in ("NumberOfFrames", "SamplesPerPixel")]
    size = None
    if all(re.fullmatch(r"[0-9]{1,9}", value) for value in (*sides, *more)):
        rows, columns, bits, frames, samples = (int(value) for value in (*sides, *more))
        size = rows * columns * bits * frames * samples // 8
    return PacsImage(
        study,
        series,
        _uid(result, "SOPInstanceUID"),
        _text(of_study, "PatientID"),
        _text(of_study, "AccessionNumber"),
        modality,
        _text(result, "InstanceNumber"),
        size,
    )


def _matching(
    results: Sequence[dict[str, Any]], terms: Mapping[str, str], ignored: Counter[str]
) -> list[dict[str, Any]]:
    """Those results that match: an archive ignores keys that it does not know, and then gives everything."""
    kept = []
    for result in results:
        wrong = [key for key, value in terms.items() if not _matches(key, _value(result, key), value)]
        ignored.update(wrong)
        if not wrong:
            kept.append(result)
    return kept


def _matches(key: str, found: Sequence[str], wanted: str) -> bool:
    """Whether an attribute is what a query asked for; one that the archive does not tell passes."""
    if not found:
        return True
    span = _RANGE.fullmatch(wanted) if key.endswith(("Date", "Time")) else None
    if span is not None:
        low, high = span.groups()
        return any(low <= value and (not high or value <= high or value.startswith(high)) for value in found)
    patterns = [in_one_form(want).casefold().replace("[", "[[]") for want in wanted.split("\\")]
    return any(fnmatch.fnmatchcase(value.casefold(), pattern) for value in found for pattern in patterns)


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: the outer ones repeat address and query."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "reason", None)
        candidates = [inner, error.__cause__, error.__context__, *error.args]
        error = next((one for one in candidates if isinstance(one, BaseException) and id(one) not in seen), error)
    return _short(error)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
