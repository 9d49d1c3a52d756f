"""DICOM whole-slide files for tests: one level a file, tiles of 128 px, uncompressed."""

from pathlib import Path

import numpy as np


def write_level(
    path: Path, pixels: np.ndarray, mpp: float, series: str, number: int, tile: int = 128, jpeg: str = ""
) -> None:
    """Write one level of a series.

    Args:
        path: the file; its folder is made.
        pixels: uint8 [h, w, 3].
        mpp: µm/px.
        series: SeriesInstanceUID.
        number: InstanceNumber; the UID of the instance ends in it.
        tile: side of a frame in pixels.
        jpeg: chroma subsampling, ``422`` or ``420``, of frames as JPEG; empty for frames as they are.
    """
    import pydicom
    import simplejpeg
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.sequence import Sequence
    from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit

    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape[:2]
    rows, columns = -(-height // tile), -(-width // tile)
    padded = np.full((rows * tile, columns * tile, 3), 255, dtype=np.uint8)
    padded[:height, :width] = pixels
    frames = padded.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID = f"{series}.{number}"
    meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    level = Dataset()
    level.file_meta = meta
    level.SOPClassUID = meta.MediaStorageSOPClassUID
    level.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    level.Modality = "SM"
    level.ImageType = [
        "ORIGINAL" if number == 1 else "DERIVED",
        "PRIMARY",
        "VOLUME",
        "NONE" if number == 1 else "RESAMPLED",
    ]
    level.StudyInstanceUID, level.SeriesInstanceUID, level.FrameOfReferenceUID = "1.2.1", series, "1.2.2"
    level.InstanceNumber = number
    colours = "YBR_FULL_422" if jpeg else "RGB"
    level.SamplesPerPixel, level.PhotometricInterpretation, level.PlanarConfiguration = 3, colours, 0
    level.BitsAllocated, level.BitsStored, level.HighBit, level.PixelRepresentation = 8, 8, 7, 0
    level.Rows = level.Columns = tile
    level.NumberOfFrames = len(frames)
    level.TotalPixelMatrixColumns, level.TotalPixelMatrixRows = width, height
    level.TotalPixelMatrixFocalPlanes = 1
    level.ImagedVolumeWidth, level.ImagedVolumeHeight = width * mpp / 1000, height * mpp / 1000
    level.DimensionOrganizationType = "TILED_FULL"
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001
    groups = Dataset()
    groups.PixelMeasuresSequence = Sequence([measures])
    level.SharedFunctionalGroupsSequence = Sequence([groups])
    icc = Dataset()
    icc.OpticalPathIdentifier = "0"
    level.OpticalPathSequence = Sequence([icc])
    if jpeg:
        streams = [simplejpeg.encode_jpeg(np.ascontiguousarray(each), 90, "RGB", jpeg) for each in frames]
        level.PixelData = encapsulate(streams)
    else:
        level.PixelData = frames.tobytes()
    pydicom.dcmwrite(path, level, enforce_file_format=True)
