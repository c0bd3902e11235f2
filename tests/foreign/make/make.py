"""Makes the files in tests/foreign anew: each tool, pinned, in an environment of its own under a temporary folder.

`python tests/foreign/make/make.py [tool ...]`. It takes minutes and some gigabytes, which are removed at the end. What
NNCF and torchao compute with kernels that onnxruntime and torch choose may differ in the last bit on another CPU.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
# tool: (its script, what is installed). torch comes first: without its version a tool brings the CUDA build.
TOOLS = {
    "onnxruntime": ("onnxruntime_files.py", ["onnxruntime==1.32.0", "onnx==1.23.2"]),
    "nncf": ("nncf_files.py", [TORCH, "nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0"]),
    "aimet": ("aimet_onnx_files.py", [TORCH, "aimet-onnx==2.42.0", "onnxruntime==1.32.0"]),
    "brevitas": ("brevitas_files.py",
                 [TORCH, "brevitas==0.13.4", "onnx==1.23.2", "onnxscript==0.7.2", "onnxoptimizer==0.4.2"]),
    "torchao": ("torchao_files.py", [TORCH, "torchao==0.18.0", "numpy"]),
}  # fmt: skip
# The kernels that every CPU has: sums in float32 then have one order, and scales that follow from them the same bits.
PLAIN_KERNELS = {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}


def make(tool: str) -> None:
    script, packages = TOOLS[tool]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        command = [python, str(HERE / script), str(HERE.parent / tool)]
        subprocess.run(command, check=True, cwd=HERE, env=os.environ | PLAIN_KERNELS)


if __name__ == "__main__":
    for name in sys.argv[1:] or TOOLS:
        make(name)
