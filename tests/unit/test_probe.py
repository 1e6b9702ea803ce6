"""The probe on a tree of files made here, and on this machine."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from platforms.probe import (
    DeviceNode,
    PciDevice,
    ProbeData,
    ThermalZone,
    probe_box,
    probe_disk,
    probe_fsync,
    probe_power_mode,
    probe_thermal,
)
from tests.harness.users import open_folder, ordinary_user
from tests.unit.recorded import NAMES, read_probe


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("name", NAMES)
def test_probe_survives_a_trip_through_json(name: str) -> None:
    probe = read_probe(name)
    assert ProbeData.from_json(json.loads(json.dumps(probe.to_json()))) == probe


def test_empty_tree_gives_absent_facts_and_no_exception(tmp_path: Path) -> None:
    probe = probe_box(tmp_path, tmp_path)
    assert probe.cpuinfo == ""
    assert probe.meminfo_kb == {}
    assert probe.cgroup.version is None
    assert probe.device_tree_model is None
    assert (probe.device_nodes, probe.pci, probe.usb_ids, probe.thermal) == ((), (), (), ())
    assert probe.clock.synchronized is None


def test_this_machine_is_probed_and_is_json_ready() -> None:
    probe = probe_box(Path.cwd())
    assert probe.cpu_count >= 1
    assert probe.system in {"Linux", "Darwin"}
    assert ProbeData.from_json(json.loads(json.dumps(probe.to_json()))) == probe


def test_board_is_read_from_the_device_tree_with_its_zero_bytes(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\x00",
            "proc/device-tree/compatible": "raspberrypi,5-model-b\x00brcm,bcm2712\x00",
        },
    )
    probe = probe_box(tmp_path, tmp_path)
    assert probe.device_tree_model == "Raspberry Pi 5 Model B Rev 1.0"
    assert probe.device_tree_compatible == ("raspberrypi,5-model-b", "brcm,bcm2712")


def test_files_of_proc_and_etc_are_read(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nprocessor\t: 1\n",
            "proc/meminfo": "MemTotal:  1024 kB\nHugePages_Total:  0\nbroken line\n",
            "proc/sys/kernel/osrelease": "6.6.62+rpt\n",
            "etc/os-release": 'PRETTY_NAME="Debian 12"\nID=debian\n# comment\n',
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3\nsecond line\n",
            "sys/class/dmi/id/product_name": "NUC14\n",
        },
    )
    probe = probe_box(tmp_path, tmp_path)
    assert (probe.cpu_count, probe.release) == (2, "6.6.62+rpt")
    assert probe.meminfo_kb == {"MemTotal": 1024, "HugePages_Total": 0}
    assert probe.os_release == {"PRETTY_NAME": "Debian 12", "ID": "debian"}
    assert probe.jetson_release == "# R36 (release), REVISION: 4.3"
    assert probe.dmi == {"product_name": "NUC14"}


def test_nested_group_of_v2_is_read_up_to_the_root(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/edge.slice/agent.service\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
            "sys/fs/cgroup/edge.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/edge.slice/memory.max": "1000000000\n",
            "sys/fs/cgroup/edge.slice/agent.service/cpu.max": "max 100000\n",
            "sys/fs/cgroup/edge.slice/agent.service/memory.max": "max\n",
            "sys/fs/cgroup/cpuset.cpus.effective": "0-3\n",
        },
    )
    cgroup = probe_box(tmp_path, tmp_path).cgroup
    assert cgroup.version == 2
    assert cgroup.cpu_max == ("max 100000", "150000 100000")
    assert cgroup.memory_max == ("max", "1000000000")
    assert cgroup.cpuset == "0-3"


def test_container_that_sees_the_hosts_group_path_is_read_at_the_mounted_root(
    tmp_path: Path,
) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
        },
    )
    cgroup = probe_box(tmp_path, tmp_path).cgroup
    assert (cgroup.version, cgroup.cpu_max, cgroup.memory_max) == (
        1,
        ("50000 100000",),
        ("536870912",),
    )


def test_group_outside_the_namespace_is_read_at_the_mounted_root(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../outside\n",
            "sys/fs/cgroup/cgroup.controllers": "",
            "sys/fs/cgroup/memory.max": "700000000\n",
            "outside/memory.max": "1\n",
        },
    )
    assert probe_box(tmp_path, tmp_path).cgroup.memory_max == ("700000000",)


def test_device_nodes_are_listed_with_their_permission(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {"dev/nvidia0": "", "dev/dri/renderD128": "", "dev/nvidia-caps/cap1": "", "dev/sda": ""},
    )
    assert probe_box(tmp_path, tmp_path).device_nodes == (
        DeviceNode("/dev/dri/renderD128", accessible=True),
        DeviceNode("/dev/nvidia0", accessible=True),
    )


def test_node_that_is_closed_to_this_user_is_not_accessible() -> None:
    with open_folder() as root:
        write_tree(root, {"dev/apex_0": ""})
        (root / "dev/apex_0").chmod(0)
        with ordinary_user():
            nodes = probe_box(root, root).device_nodes
    assert nodes == (DeviceNode("/dev/apex_0", accessible=False),)


def test_pci_lists_displays_and_accelerators_with_their_driver(tmp_path: Path) -> None:
    devices = "sys/bus/pci/devices"
    write_tree(
        tmp_path,
        {
            f"{devices}/0000:00:02.0/class": "0x030000\n",
            f"{devices}/0000:00:02.0/vendor": "0x8086\n",
            f"{devices}/0000:00:02.0/device": "0x7d55\n",
            f"{devices}/0000:00:0b.0/class": "0x120000\n",
            f"{devices}/0000:00:0b.0/vendor": "0x8086\n",
            f"{devices}/0000:00:0b.0/device": "0x7d1d\n",
            f"{devices}/0000:00:1f.0/class": "0x060100\n",
            f"{devices}/0000:01:00.0/class": "0x088000\n",
            f"{devices}/0000:01:00.0/vendor": "0x1ac1\n",
            f"{devices}/0000:01:00.0/device": "0x089a\n",
            "sys/bus/pci/drivers/intel_vpu/bind": "",
        },
    )
    (tmp_path / devices / "0000:00:0b.0/driver").symlink_to("../../drivers/intel_vpu")
    assert probe_box(tmp_path, tmp_path).pci == (
        PciDevice("0x8086", "0x7d55", "0x030000", None),
        PciDevice("0x8086", "0x7d1d", "0x120000", "intel_vpu"),
        PciDevice("0x1ac1", "0x089a", "0x088000", None),
    )


def test_coral_is_found_on_usb_and_other_devices_are_not_kept(tmp_path: Path) -> None:
    devices = "sys/bus/usb/devices"
    write_tree(
        tmp_path,
        {
            f"{devices}/1-1/idVendor": "1a6e\n",
            f"{devices}/1-1/idProduct": "089a\n",
            f"{devices}/1-2/idVendor": "046d\n",
            f"{devices}/1-2/idProduct": "c52b\n",
            f"{devices}/1-0:1.0/bInterfaceClass": "09\n",
        },
    )
    assert probe_box(tmp_path, tmp_path).usb_ids == ("1a6e:089a",)


def test_libraries_of_accelerator_drivers_are_found(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {"usr/lib/aarch64-linux-gnu/libedgetpu.so.1": "", "lib/ld-musl-aarch64.so.1": ""},
    )
    found = probe_box(tmp_path, tmp_path).libraries
    assert found == ("ld-musl-aarch64.so.1", "libedgetpu.so.1")


def test_sensor_that_gives_no_number_is_left_out(tmp_path: Path) -> None:
    thermal = "sys/class/thermal"
    write_tree(
        tmp_path,
        {
            f"{thermal}/thermal_zone0/type": "cpu-thermal\n",
            f"{thermal}/thermal_zone0/temp": "51121\n",
            f"{thermal}/thermal_zone1/type": "off\n",
            f"{thermal}/thermal_zone1/temp": "\n",
            f"{thermal}/thermal_zone2/temp": "-5000\n",
        },
    )
    assert probe_thermal(tmp_path) == (
        ThermalZone("cpu-thermal", 51.121),
        ThermalZone("thermal_zone2", -5.0),
    )


def test_hwmon_stands_in_where_there_is_no_thermal_zone(tmp_path: Path) -> None:
    hwmon = "sys/class/hwmon/hwmon0"
    write_tree(tmp_path, {f"{hwmon}/name": "k10temp\n", f"{hwmon}/temp1_input": "40500\n"})
    assert probe_thermal(tmp_path) == (ThermalZone("k10temp", 40.5),)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"var/lib/nvpmodel/status": "pmode:0002"}, "nvpmodel 0002"),
        ({"sys/firmware/acpi/platform_profile": "low-power\n"}, "low-power"),
        ({"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n"}, "ondemand"),
    ],
)
def test_power_mode_comes_from_whichever_file_there_is(
    tmp_path: Path, files: dict[str, str], expected: str | None
) -> None:
    assert probe_power_mode(write_tree(tmp_path, files)) == expected


def make_card(root: Path, point: Path) -> None:
    """Lay out an SD card whose second partition is mounted at `point`."""
    card = "sys/devices/mmc0/block/mmcblk0"
    write_tree(
        root,
        {
            "proc/self/mountinfo": (
                "21 1 8:1 / / rw - xfs /dev/sda1 rw\n"
                f"30 21 179:2 / {point} rw shared:1 - ext4 /dev/root rw\n"
            ),
            f"{card}/queue/rotational": "0\n",
            f"{card}/device/type": "SD\n",
            f"{card}/mmcblk0p2/partition": "2\n",
        },
    )
    (root / "sys/dev/block").mkdir(parents=True)
    (root / "sys/dev/block/179:2").symlink_to(root / card / "mmcblk0p2")


def test_disk_is_the_whole_card_below_the_deepest_mount(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    make_card(tmp_path, tmp_path)
    disk = probe_disk(data_dir, tmp_path)
    assert (disk.filesystem, disk.device, disk.card_type) == ("ext4", "mmcblk0", "SD")
    assert disk.rotational is False
    assert disk.total_bytes
    assert disk.free_bytes is not None


def test_filesystem_with_a_number_of_its_own_is_found_by_its_source(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/mountinfo": "21 1 0:33 / / rw - btrfs /dev/sdb rw\n",
            "sys/class/block/sdb/queue/rotational": "1\n",
        },
    )
    disk = probe_disk(tmp_path, tmp_path)
    assert (disk.filesystem, disk.device, disk.rotational) == ("btrfs", "sdb", True)


def test_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path: Path) -> None:
    missing = tmp_path / "var" / "lib" / "edgeward"
    disk = probe_disk(missing, tmp_path)
    assert disk.path == str(missing)
    assert disk.total_bytes == probe_disk(tmp_path, tmp_path).total_bytes
    assert not missing.exists()


def test_fsync_probe_measures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    facts = probe_fsync(tmp_path)
    assert facts.writable
    assert facts.fsync_ms is not None
    assert facts.fsync_ms > 0
    assert list(tmp_path.iterdir()) == []


def test_fsync_probe_of_a_missing_folder_says_why(tmp_path: Path) -> None:
    facts = probe_fsync(tmp_path / "missing")
    assert (facts.writable, facts.error) == (False, "No such file or directory")


def test_marks_of_containers_are_read(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {".dockerenv": "", "run/.containerenv": "", "proc/1/cgroup": "0::/kubepods/pod1\n"},
    )
    hints = probe_box(tmp_path, tmp_path).container
    assert (hints.dockerenv, hints.containerenv) == (True, True)
    assert hints.init_cgroup == "0::/kubepods/pod1"


def test_mark_of_the_time_service_means_synchronised(tmp_path: Path) -> None:
    write_tree(tmp_path, {"run/systemd/timesync/synchronized": ""})
    clock = probe_box(tmp_path, tmp_path).clock
    assert (clock.synchronized, clock.source) == (True, "timesyncd")


@pytest.mark.skipif(sys.platform != "linux", reason="adjtimex is Linux's")
def test_kernel_says_whether_this_clock_is_kept() -> None:
    assert probe_box(Path.cwd()).clock.synchronized in {True, False}
