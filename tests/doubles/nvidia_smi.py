"""A stand-in for nvidia-smi: the CSV query, the XML report and the list that ``gpus_here`` asks for.

NVIDIA_SMI_DOUBLE says which boards there are, as JSON: name, MiB of memory, compute capability, and under ``mig`` a
list of [profile, MiB, multiprocessors] where MIG is on; ``virtualization`` is None unless it is said. The report has
the elements of nvsmi_device_v12.dtd that public reports of driver 575 show, in their order. It imports nothing of the
toolkit.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

DRIVER = "590.44.01"


def csv(board: dict[str, Any]) -> str:
    return f"{board['name']}, {board['mib']}, {board['capability']}, {board.get('driver', DRIVER)}"


def report(board: dict[str, Any]) -> str:
    slices = board.get("mig")
    devices = "".join(
        f"<mig_device><index>{index}</index><gpu_instance_id>{index + 1}</gpu_instance_id>"
        f"<compute_instance_id>0</compute_instance_id><device_attributes><shared><multiprocessor_count>{processors}"
        f"</multiprocessor_count></shared></device_attributes><fb_memory_usage><total>{mib} MiB</total>"
        "<reserved>0 MiB</reserved></fb_memory_usage></mig_device>"
        for index, (_, mib, processors) in enumerate(slices or [])
    )
    return (
        f'<gpu id="00000000:00:09.0"><product_name>{board["name"]}</product_name>'
        f"<mig_mode><current_mig>{'N/A' if slices is None else 'Enabled'}</current_mig></mig_mode>"
        f"<mig_devices>{devices}</mig_devices><gpu_virtualization_mode><virtualization_mode>"
        f"{board.get('virtualization', 'None')}</virtualization_mode></gpu_virtualization_mode>"
        f"<fb_memory_usage><total>{board['mib']} MiB</total></fb_memory_usage></gpu>"
    )


def listing(index: int, board: dict[str, Any]) -> str:
    lines = [f"GPU {index}: {board['name']} (UUID: GPU-{index})"]
    for number, (profile, _, _) in enumerate(board.get("mig") or []):
        lines.append(f"  MIG {profile}     Device  {number}: (UUID: MIG-{number})")
    return "\n".join(lines)


def main() -> None:
    boards = json.loads(os.environ["NVIDIA_SMI_DOUBLE"])
    if "-x" in sys.argv:
        print('<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">')
        print(
            f"<nvidia_smi_log><driver_version>{DRIVER}</driver_version>{''.join(map(report, boards))}</nvidia_smi_log>"
        )
    elif "-L" in sys.argv:
        print("\n".join(listing(index, board) for index, board in enumerate(boards)))
    else:
        print("\n".join(map(csv, boards)))


if __name__ == "__main__":
    main()
