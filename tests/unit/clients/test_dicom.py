"""DICOM becomes a picture as its own header says: pydicom's transforms, written values and frames as the oracle."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.processing import apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, MRImageStorage, RLELossless, generate_uid

from secure_fed.clients import dicom_header
from secure_fed.clients.decoding import decode
from secure_fed.clients.dicom_header import is_dicom, patient_id
from secure_fed.clients.reading import identity
from secure_fed.clients.rules import UndecodableError

RAMP = np.arange(-600, 1000, 25, dtype=np.int16).reshape(8, 8)


def dicom(pixels, colour="MONOCHROME2", **fields) -> Dataset:
    """A file of signed or unsigned grey values, [rows, columns] or [frames, rows, columns], or bytes of colours."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.PatientID, dataset.Modality, dataset.PhotometricInterpretation = "MRN-7781", "MR", colour
    colours = colour == "RGB" or colour.startswith("YBR")
    dataset.SamplesPerPixel = 3 if colours else 1
    if colours:
        dataset.PlanarConfiguration = 0
    frames = pixels.shape[0] if pixels.ndim == 3 and not colours else None
    if frames:
        dataset.NumberOfFrames = frames
    dataset.Rows, dataset.Columns = pixels.shape[1:3] if frames else pixels.shape[:2]
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    return dataset


def as_bytes(dataset: Dataset) -> bytes:
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def grey(dataset: Dataset, frame=None) -> np.ndarray:
    image = decode(as_bytes(dataset), frame)
    assert image.mode == "L"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2, -100), (0.5, 40)])
def test_rescale_and_window_are_the_standards(function, slope, intercept):
    fields = {"RescaleSlope": slope, "RescaleIntercept": intercept, "VOILUTFunction": function}
    dataset = dicom(RAMP, WindowCenter=[150, 9], WindowWidth=[400, 1], **fields)
    shown = apply_windowing(RAMP * slope + intercept, dataset).astype(float)  # the first window
    # pydicom stretches to the range of the stored values, rescaled.
    low, high = -(2**15) * slope + intercept, (2**15 - 1) * slope + intercept
    expected = 255 * (shown - low) / (high - low)
    assert np.abs(grey(dataset) - expected).max() <= 1
    assert len(np.unique(grey(dataset))) > 5


def test_without_a_window_the_extremes_are_black_and_white():
    wide = RAMP.astype(float)
    expected = np.rint(255 * (wide - wide.min()) / (wide.max() - wide.min())).astype(int)
    assert np.array_equal(grey(dicom(RAMP)), expected)
    assert not grey(dicom(np.full((4, 4), 7, dtype=np.int16))).any()


def test_monochrome1_is_inverted():
    window = {"WindowCenter": 150, "WindowWidth": 400}
    plain, inverted = grey(dicom(RAMP, **window)), grey(dicom(RAMP, "MONOCHROME1", **window))
    assert np.array_equal(inverted, 255 - plain)
    assert plain[0, 0] == 0


def test_a_voi_table_comes_before_a_window():
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], [0, 65535, 13107, 26214]
    values = np.array([[0, 1], [2, 3]], dtype=np.uint16)
    dataset = dicom(values, VOILUTSequence=Sequence([table]), WindowCenter=1, WindowWidth=2)
    for element in ("LUTDescriptor", "LUTData"):
        table[element].VR = "US"
    assert grey(dataset).tolist() == [[0, 255], [51, 102]]


def test_of_many_frames_the_chosen_or_the_middle_one_is_shown():
    frames = np.stack([np.full((4, 4), value, dtype=np.uint8) for value in range(5)])
    frames[:, 0, 0] = 255  # so that the least and greatest value differ
    frames[:, 0, 1] = 0
    found = [grey(dicom(frames), frame)[3, 3] for frame in (0, 1, 4, None)]
    assert found == [0, 1, 4, 2]
    with pytest.raises(UndecodableError, match="no frame 5; it has 5, counted from 0"):
        decode(as_bytes(dicom(frames)), 5)


def test_an_enhanced_files_frames_have_windows_of_their_own():
    groups = []
    for centre in (100, 200):
        voi, transform, group = Dataset(), Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = centre, 100, "LINEAR_EXACT"
        transform.RescaleSlope, transform.RescaleIntercept = 1, centre
        group.FrameVOILUTSequence, group.PixelValueTransformationSequence = Sequence([voi]), Sequence([transform])
        groups.append(group)
    frames = np.stack([np.array([[0, 25], [50, 60]], dtype=np.int16)] * 2)
    dataset = dicom(frames, PerFrameFunctionalGroupsSequence=Sequence(groups))
    # Value v becomes v + centre, which the window around the centre shows at (v + 50) %.
    assert grey(dataset, 0).tolist() == grey(dataset, 1).tolist() == [[128, 191], [255, 255]]


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("PixelValueTransformationSequence", {}),
        ("PixelValueTransformationSequence", {"RescaleSlope": None, "RescaleIntercept": None}),
        ("PixelValueTransformationSequence", {"RescaleType": "HU"}),
        ("FrameVOILUTSequence", {"WindowCenterWidthExplanation": "AUTO"}),
        ("FrameVOILUTSequence", {"WindowCenter": None, "WindowWidth": None}),
    ],
)
def test_a_frames_group_that_says_nothing_does_not_hide_what_all_frames_share(name, empty):
    voi, transform, shared, item, group = (Dataset() for _ in range(5))
    voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = -50, 100, "LINEAR_EXACT"
    transform.RescaleSlope, transform.RescaleIntercept = 1, -100
    shared.FrameVOILUTSequence, shared.PixelValueTransformationSequence = Sequence([voi]), Sequence([transform])
    for keyword, value in empty.items():
        setattr(item, keyword, value)
    setattr(group, name, Sequence([item]))
    groups = {
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence([group] * 2),
    }
    frames = np.stack([np.array([[0, 25], [50, 60]], dtype=np.int16)] * 2)
    assert grey(dicom(frames, **groups), 1).tolist() == [[0, 64], [128, 153]]


def enhanced(alongs, orientation=(0, 1, 0, 0, 0, -1), **fields) -> Dataset:
    """Frames of which each is filled with its number, at these places along the normal; None says no place."""
    groups = []
    for along in alongs:
        place, group = Dataset(), Dataset()
        if along is not None:
            place.ImagePositionPatient = [-along, 7, 8]  # the normal is (-1, 0, 0)
            group.PlanePositionSequence = Sequence([place])
        groups.append(group)
    plane, shared = Dataset(), Dataset()
    plane.ImageOrientationPatient = list(orientation)
    shared.PlaneOrientationSequence = Sequence([plane])
    frames = np.stack([np.full((4, 4), number % 256, dtype=np.uint8) for number in range(len(alongs))])
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": groups}
    groups = {name: Sequence(items) for name, items in groups.items()}
    return dicom(frames, WindowCenter=128, WindowWidth=256, **groups, **fields)


def across(dataset: Dataset) -> Dataset:
    """The same with one frame across the others."""
    plane = Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PerFrameFunctionalGroupsSequence[1].PlaneOrientationSequence = Sequence([plane])
    return dataset


@pytest.mark.parametrize(
    ("dataset", "middle"),
    [
        (enhanced([30, 0, 10, 40, 20]), 4),
        (enhanced([30, 0, 10, 20]), 3),
        (enhanced([5, 5, 5]), 1),
        (enhanced([30, None, 10, 40, 20]), 2),
        (across(enhanced([30, 0, 10, 40, 20])), 2),
        (enhanced([30, 0, 10, 40, 20], orientation=()), 2),
    ],
)
def test_the_middle_frame_is_the_middle_one_by_position_if_all_frames_have_one_on_parallel_planes(dataset, middle):
    assert grey(dataset).max() == grey(dataset, middle).max()
    assert [grey(dataset, one).max() for one in range(3)] == [0, 1, 2]  # a number is of the frames as they are stored


def test_colours_and_compressed_grey():
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode(as_bytes(dicom(colours, "RGB")))), colours)
    squeezed = dicom(RAMP, WindowCenter=150, WindowWidth=400)
    expected = grey(squeezed)
    squeezed.compress(RLELossless)
    assert np.array_equal(grey(squeezed), expected)


def test_what_cannot_be_decoded_says_why():
    unknown = dicom(RAMP)
    unknown.file_meta.TransferSyntaxUID = JPEGLSLossless
    unknown.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
    unknown["PixelData"].is_undefined_length = True
    report = dicom(RAMP)
    del report.PixelData
    floating = {}
    for name, kind in (("FloatPixelData", np.float32), ("DoubleFloatPixelData", np.float64)):
        floating[name] = dicom(RAMP, **{name: RAMP.astype(kind).tobytes()})
        del floating[name].PixelData
    short = as_bytes(dicom(RAMP))[:-40]
    cases = [
        (as_bytes(floating["FloatPixelData"]), r"floating point numbers \(FloatPixelData \(7FE0,0008\)\); expec"),
        (as_bytes(floating["DoubleFloatPixelData"]), r"floating point numbers \(DoubleFloatPixelData \(7FE0,0009\)"),
        (as_bytes(unknown), "cannot be decoded .JPEG-LS Lossless"),
        (as_bytes(report), "DICOM without pixels .MR."),
        (short, "cannot be decoded"),
        (as_bytes(dicom(RAMP, "CMYK")), r"PhotometricInterpretation \(0028,0004\) is CMYK"),
        (as_bytes(dicom(RAMP, WindowCenter=1, WindowWidth=2, VOILUTFunction="MAGIC")), "VOI function MAGIC"),
        (b"\0" * 128 + b"DICM" + b"rubbish" * 9, "DICOM"),
    ]
    for content, reason in cases:
        assert is_dicom(content)
        with pytest.raises(UndecodableError, match=reason):
            decode(content)


def test_a_frame_of_an_ordinary_picture_is_refused():
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    assert decode(stream.getvalue()).size == (8, 8)
    with pytest.raises(UndecodableError, match="frame 0 of a file with one image"):
        decode(stream.getvalue(), 0)


def test_the_patient_is_in_the_header(tmp_path):
    (tmp_path / "a.dcm").write_bytes(as_bytes(dicom(RAMP)))
    (tmp_path / "b.dcm").write_bytes(as_bytes(dicom(RAMP, PatientID="")))
    (tmp_path / "c.png").write_bytes(b"no DICOM")
    (tmp_path / "d.dcm").write_bytes(b"\0" * 128 + b"DICMrubbish")
    names = ("a.dcm", "b.dcm", "c.png", "d.dcm", "absent.dcm")
    (tmp_path / "e.dcm").write_bytes(as_bytes(dicom(RAMP)).replace(b"MRN-7781", b"MRN\\7781"))
    assert patient_id(tmp_path / "e.dcm") == "MRN\\7781"
    assert [patient_id(tmp_path / name) for name in names] == ["MRN-7781", "", "", "", ""]


def test_a_patients_id_is_found_wherever_it_stands_and_no_more_is_read_where_it_is_in_its_place(tmp_path, monkeypatch):
    content = as_bytes(dicom(RAMP))
    element = content[content.index(b"\x10\0\x20\0LO") :][:16]
    pixels = content.index(b"\xe0\x7f\x10\0")
    (tmp_path / "a.dcm").write_bytes(content)
    (tmp_path / "b.dcm").write_bytes(content[:pixels].replace(element, b"") + element + content[pixels:])
    asked = []

    def spy(path, until):
        asked.append(until)
        return read_header(path, until)

    read_header = dicom_header.read_header
    monkeypatch.setattr(dicom_header, "read_header", spy)
    assert [patient_id(tmp_path / name) for name in ("a.dcm", "b.dcm")] == ["MRN-7781"] * 2
    assert len(asked) == 3
    assert asked[0] < 0x00280000  # behind the series, whose owner it tells, and before what describes the picture
    assert "Modality" in read_header(tmp_path / "a.dcm", asked[0])
    assert "ImageType" not in read_header(tmp_path / "a.dcm", 0x00080008)


def test_an_identity_is_of_the_file_and_the_frame():
    known = {identity(b"one", None), identity(b"one", 0), identity(b"one", 1), identity(b"two", None)}
    assert len(known) == 4
    assert all(len(one) == 32 for one in known)
