"""Render one kernel template to a .pyx file, and write a depfile of every template that was read.

    render.py --name gemv_i8_i2_4x64__avx2 --template schemes/i2.pyx.j2 --out FILE.pyx --depfile FILE.d

The name says everything that a template may ask for: op, scheme, tile, instruction set.
"""

import argparse
import pathlib
import re

import jinja2

HERE = pathlib.Path(__file__).resolve().parent
NAME = re.compile(r"(?P<op>[a-z]+)_(?P<act>i8)_(?P<scheme>[a-z0-9]+)_(?P<rows>\d+)x(?P<block>\d+)__(?P<isa>[a-z0-9]+)")


class RecordingLoader(jinja2.FileSystemLoader):
    """A loader that remembers which files it opened."""

    def __init__(self, root):
        super().__init__(root)
        self.opened = set()

    def get_source(self, environment, template):
        source = super().get_source(environment, template)
        self.opened.add(source[1])
        return source


def fields_of_81(digits):
    """128 bytes: entry r < 81 holds the low ``digits`` (3 or 4) base-3 digits of r as 2-bit fields, lowest first."""
    return [sum((r // 3**i % 3) << (2 * i) for i in range(digits)) if r < 81 else 0 for r in range(128)]


def inverse32(n):
    """n * inverse32(n) = 1 modulo 2**32, as a signed number: an exact division by an odd n is a product."""
    return (pow(n, -1, 2**32) + 2**31) % 2**32 - 2**31


def divided(value, divisor):
    """C int expression of ``value`` divided by ``divisor``, where there is no remainder.

    A power of two is shifted away; an odd divisor has an inverse modulo 2**32, and what wraps comes out right.
    """
    twos = (divisor & -divisor).bit_length() - 1
    odd = divisor >> twos
    if twos:
        value = f"({value}) >> {twos}"
    return value if odd == 1 else f"<int>(<unsigned int>({value}) * {inverse32(odd) % 2**32}u)"


def environment():
    """The Jinja environment of all kernel templates; an undefined name is an error."""
    env = jinja2.Environment(
        loader=RecordingLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.globals["fields_of_81"] = fields_of_81
    env.globals["inverse32"] = inverse32
    env.globals["divided"] = divided
    return env


def render(env, name, template):
    """The Cython source of kernel ``name``."""
    parts = NAME.fullmatch(name)
    if parts is None:
        raise SystemExit(f"a kernel name has the form op_i8_scheme_RxB__isa, got {name!r}")
    return env.get_template(template).render(
        name=name,
        template=template,
        op=parts["op"],
        scheme_name=parts["scheme"],
        isa_name=parts["isa"],
        rows=int(parts["rows"]),
        block=int(parts["block"]),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--name", "--template", "--out", "--depfile"):
        parser.add_argument(flag, required=True)
    args = parser.parse_args()
    env = environment()
    pathlib.Path(args.out).write_text(render(env, args.name, args.template), encoding="utf-8")
    opened = sorted(env.loader.opened | {str(pathlib.Path(__file__).resolve())})
    escaped = " ".join(path.replace(" ", "\\ ") for path in opened)
    pathlib.Path(args.depfile).write_text(f"{args.out}: {escaped}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
