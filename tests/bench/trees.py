"""Trees of /sys and /proc as devices have them, written below a directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_I2C = "sys/bus/i2c/devices/1-0040"
# A Jetson Orin Nano with JetPack 6: three channels, and the driver's sum of shunt voltages.
ORIN_NANO = {
    f"{_I2C}/name": "ina3221\n",
    **{f"{_I2C}/hwmon/hwmon1/{name}": f"{value}\n" for name, value in {
        "name": "ina3221", "in1_label": "VDD_IN", "in1_input": 5120, "curr1_input": 1000, "in2_label": "VDD_CPU_GPU_CV",
        "in2_input": 5104, "curr2_input": 320, "in3_label": "VDD_SOC", "in3_input": 5104, "curr3_input": 240,
        "in7_label": "sum of shunt voltages", "in7_input": 0}.items()},
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n", "sys/class/thermal/thermal_zone0/temp": "48531\n",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n", "sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "sys/class/thermal/thermal_zone2/type": "tj-thermal\n", "sys/class/thermal/thermal_zone2/temp": "49750\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1190400\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu5/cpufreq/scaling_cur_freq": "1510400\n",
}
# A Jetson AGX: no rail feeds the whole module, two chips tell parts of it, and one channel is not connected.
AGX_ORIN = {
    f"{_I2C}/name": "ina3221\n",
    **{f"{_I2C}/hwmon/hwmon3/{name}": f"{value}\n" for name, value in {
        "in1_label": "VDD_GPU_SOC", "in1_input": 20000, "curr1_input": 200, "in2_label": "VDD_CPU_CV",
        "in2_input": 20000, "curr2_input": 100, "in3_label": "VIN_SYS_5V0", "in3_input": 5000,
        "curr3_input": 600}.items()},
    "sys/bus/i2c/devices/1-0041/name": "ina3221\n",
    **{f"sys/bus/i2c/devices/1-0041/hwmon/hwmon4/{name}": f"{value}\n" for name, value in {
        "in1_label": "NC", "in1_input": 0, "curr1_input": 0, "in2_label": "VDDQ_VDD2_1V8AO", "in2_input": 5000,
        "curr2_input": 200}.items()},
}
# A Jetson Nano with JetPack 4: iio, milliwatts told by the driver.
NANO = {
    "sys/bus/i2c/devices/6-0040/name": "ina3221x\n",
    **{f"sys/bus/i2c/devices/6-0040/iio:device0/{name}": f"{value}\n" for name, value in {
        "rail_name_0": "POM_5V_IN", "in_power0_input": 2003, "rail_name_1": "POM_5V_GPU", "in_power1_input": 80,
        "rail_name_2": "POM_5V_CPU", "in_power2_input": 320}.items()},
}
_RAPL = "sys/class/powercap"
# A laptop of Intel's: one package, of which core is a part; memory apart; the platform's own counter is no package.
INTEL = {
    f"{_RAPL}/intel-rapl:0/name": "package-0\n", f"{_RAPL}/intel-rapl:0/energy_uj": "262143000000\n",
    f"{_RAPL}/intel-rapl:0/max_energy_range_uj": "262143328850\n",
    f"{_RAPL}/intel-rapl:0:0/name": "core\n", f"{_RAPL}/intel-rapl:0:0/energy_uj": "1000\n",
    f"{_RAPL}/intel-rapl:0:0/max_energy_range_uj": "262143328850\n",
    f"{_RAPL}/intel-rapl:0:1/name": "dram\n", f"{_RAPL}/intel-rapl:0:1/energy_uj": "5000000\n",
    f"{_RAPL}/intel-rapl:0:1/max_energy_range_uj": "65712999613\n",
    f"{_RAPL}/intel-rapl:1/name": "psys\n", f"{_RAPL}/intel-rapl:1/energy_uj": "9\n",
    f"{_RAPL}/intel-rapl:1/max_energy_range_uj": "262143328850\n",
    "sys/class/hwmon/hwmon2/name": "coretemp\n", "sys/class/hwmon/hwmon2/temp1_input": "57000\n",
    "sys/class/hwmon/hwmon0/name": "nvme\n", "sys/class/hwmon/hwmon0/temp1_input": "71000\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "12\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": "12\n",
    "sys/class/dmi/id/product_name": "ThinkPad X1\n",
}
_BATTERY = "sys/class/power_supply"
BATTERY = {
    f"{_BATTERY}/AC/type": "Mains\n", f"{_BATTERY}/AC/online": "0\n",
    f"{_BATTERY}/hidpp_battery_0/type": "Battery\n", f"{_BATTERY}/hidpp_battery_0/scope": "Device\n",
    f"{_BATTERY}/hidpp_battery_0/status": "Discharging\n",
    f"{_BATTERY}/BAT0/type": "Battery\n", f"{_BATTERY}/BAT0/status": "Discharging\n",
    f"{_BATTERY}/BAT0/power_now": "8450000\n",
}


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    """`root`, with these files below it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
