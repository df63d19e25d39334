"""VFIO's structures and numbers in dmaproof.vfio.abi equal those of the kernel's headers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from struct import Struct

import pytest

from dmaproof.vfio import abi
from dmaproof.vfio.abi import Feature, Request

VFIO_STRUCTS: dict[str, Struct] = {
    "vfio_group_status": abi.GROUP_STATUS,
    "vfio_iommu_type1_dma_map": abi.TYPE1_DMA_MAP,
    "vfio_iommu_type1_dma_unmap": abi.TYPE1_DMA_UNMAP,
    "vfio_iommu_type1_dirty_bitmap": abi.TYPE1_DIRTY_BITMAP,
    "vfio_region_info": abi.REGION_INFO,
    "vfio_irq_info": abi.IRQ_INFO,
    "vfio_device_feature": abi.DEVICE_FEATURE,
    "vfio_device_feature_migration": abi.DATA_MIGRATION,
    "vfio_device_feature_mig_state": abi.DATA_MIG_STATE,
    "vfio_device_feature_dma_logging_control": abi.DATA_LOGGING_CONTROL,
    "vfio_device_feature_dma_logging_range": abi.DATA_LOGGING_RANGE,
    "vfio_device_feature_dma_logging_report": abi.DATA_LOGGING_REPORT,
}


VFIO_REQUESTS: dict[str, Request] = {
    "VFIO_GET_API_VERSION": abi.GET_API_VERSION,
    "VFIO_CHECK_EXTENSION": abi.CHECK_EXTENSION,
    "VFIO_SET_IOMMU": abi.SET_IOMMU,
    "VFIO_GROUP_GET_STATUS": abi.GROUP_GET_STATUS,
    "VFIO_GROUP_SET_CONTAINER": abi.GROUP_SET_CONTAINER,
    "VFIO_GROUP_GET_DEVICE_FD": abi.GROUP_GET_DEVICE_FD,
    "VFIO_IOMMU_MAP_DMA": abi.IOMMU_MAP_DMA,
    "VFIO_IOMMU_UNMAP_DMA": abi.IOMMU_UNMAP_DMA,
    "VFIO_IOMMU_DIRTY_PAGES": abi.IOMMU_DIRTY_PAGES,
    "VFIO_DEVICE_GET_INFO": abi.DEVICE_GET_INFO,
    "VFIO_DEVICE_GET_REGION_INFO": abi.DEVICE_GET_REGION_INFO,
    "VFIO_DEVICE_GET_IRQ_INFO": abi.DEVICE_GET_IRQ_INFO,
    "VFIO_DEVICE_RESET": abi.DEVICE_RESET,
}


def test_structures_and_numbers_equal_those_of_the_kernels_headers(tmp_path: Path) -> None:
    if shutil.which("cc") is None or not Path("/usr/include/linux/vfio.h").exists():
        pytest.skip("no compiler or kernel headers: apt-get install gcc linux-libc-dev")
    lines = [f'printf("%zu\\n", sizeof(struct {name}));' for name in VFIO_STRUCTS]
    lines += [f'printf("%d\\n", {name});' for name in VFIO_REQUESTS]
    features = [feature for feature in Feature if feature < 9]  # those of older headers
    lines += [f'printf("%d\\n", VFIO_DEVICE_FEATURE_{feature.name});' for feature in features]
    source = tmp_path / "sizes.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stdio.h>\n#include <linux/vfio.h>\nint main(void) {{ {body} return 0; }}\n"
    )
    subprocess.run(["cc", "-o", tmp_path / "sizes", source], check=True, timeout=900)
    printed = subprocess.run(
        [tmp_path / "sizes"], check=True, capture_output=True, text=True, timeout=900
    ).stdout.split()
    expected = [struct.size for struct in VFIO_STRUCTS.values()]
    expected += [request.number for request in VFIO_REQUESTS.values()]
    expected += [int(feature) for feature in features]
    assert [int(number) for number in printed] == expected
