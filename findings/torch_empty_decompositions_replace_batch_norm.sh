#!/usr/bin/env bash
# torch 2.13.0: ExportedProgram.run_decompositions({}) names nothing to decompose. It replaces batch_norm by
# _native_batch_norm_legit_no_training with three results, flatten by view, and chunk by split.
# Seen: "before batch_norm flatten chunk; after _native_batch_norm_legit_no_training view split".
# What follows: the call is no way to take changes in place out of a program and keep the operators of its modules.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(2)

    def forward(self, x):
        return torch.chunk(self.norm(x).flatten(1), 2, 1)[0]


def operators(program):
    names = [n.target._schema.name for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return " ".join(name.removeprefix("aten::") for name in names)


program = torch.export.export(Net().eval(), (torch.ones(2, 2, 2, 2),))
found = operators(program), operators(program.run_decompositions({}))
print("before %s; after %s" % found)
assert found == ("batch_norm flatten chunk", "_native_batch_norm_legit_no_training view split"), "changed"
PY
