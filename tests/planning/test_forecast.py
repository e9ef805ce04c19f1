"""What a schedule hides, on modules written by hand."""

import pytest

from llava_jax.jax_compat import CALLBACK
from llava_jax.planning.devices import GPUS, rates_of
from llava_jax.planning.forecast import (
    DISK_RATE,
    FROM_HOST,
    LINKS,
    MEMORY,
    PRODUCTS,
    TO_HOST,
    describe_forecast,
    forecast,
)

STACK, LAYER = "bf16[4,4096,4096]{2,1,0:S(5)}", "bf16[1,4096,4096]{2,1,0}"
START = f"(({STACK}, s32[]), {LAYER}, u32[])"
SIZE = 4096 * 4096 * 2
DOT = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"

# Each iteration copies a layer to the device, computes a product of %x, and copies back.
MODULE = f"""HloModule jit_step, is_scheduled=true

%body (p: (s32[], {STACK}, bf16[8192,4096])) -> (s32[], {STACK}, bf16[8192,4096]) {{
  %p = (s32[], {STACK}, bf16[8192,4096]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = {STACK} get-tuple-element(%p), index=1
  %x = bf16[8192,4096]{{1,0}} get-tuple-element(%p), index=2
  %y = bf16[4096,4096]{{1,0}} constant(0)
BODY
  ROOT %out = (s32[], {STACK}, bf16[8192,4096]{{1,0}}) tuple(%i, %w, %x)
}}

%condition (q: (s32[], {STACK}, bf16[8192,4096])) -> pred[] {{
  %q = (s32[], {STACK}, bf16[8192,4096]{{1,0}}) parameter(0)
  ROOT %less = pred[] constant(true)
}}

ENTRY %main (a: (s32[], {STACK}, bf16[8192,4096])) -> (s32[], {STACK}, bf16[8192,4096]) {{
  %a = (s32[], {STACK}, bf16[8192,4096]{{1,0}}) parameter(0)
  ROOT %loop = (s32[], {STACK}, bf16[8192,4096]{{1,0}}) while(%a), condition=%condition, \
body=%body, backend_config={{"known_trip_count":{{"n":"4"}}}}
}}
"""
COPY = f"  %start = {START} fusion-start(%w, %i), kind=kLoop"
DONE = f"  %done = {LAYER} fusion-done(%start)"
PRODUCT = f"  %product = bf16[8192,4096]{{1,0}} dot(%x, %y), {DOT}"
BACK = (
    f"  %back = (({STACK}, {LAYER}, s32[]), {STACK}, u32[]) fusion-start(%w, %done, %i), kind=kLoop"
)
BACK_DONE = f"  %written = {STACK} fusion-done(%back)"

RATES = GPUS["rtx3090"].rates
COPY_SECONDS = SIZE / (LINKS * RATES.pcie)
PRODUCT_SECONDS = 2 * 8192 * 4096**2 / (PRODUCTS * RATES.products)


# The computation of an asynchronous slice. The copy engine copies a slice that is annotated.
SLICE = f"""%slice (stack: {STACK}, at: s32[]) -> {LAYER} {{
  %stack = {STACK} parameter(0)
  %at = s32[] parameter(1)
  ROOT %sliced = {LAYER} dynamic-slice(%stack, %at, %at, %at), CONFIG
}}

%body"""
ANNOTATED = 'backend_config={"dynamic_slice_config":{"byte_stride":"33554432"}}'


def of(*lines: str, config: str = ""):
    module = MODULE.replace("BODY", "\n".join(lines))
    if config:
        module = module.replace("%body", SLICE.replace("CONFIG", config), 1)
    return forecast(module, RATES)


def test_a_product_between_start_and_done_hides_a_copy():
    assert COPY_SECONDS < PRODUCT_SECONDS
    found = of(COPY, PRODUCT, DONE)
    assert found.copied == {FROM_HOST: 4 * SIZE, TO_HOST: 0}
    assert found.hidden == found.copied
    assert found.seconds == pytest.approx(4 * PRODUCT_SECONDS)
    assert found.serial_seconds == pytest.approx(4 * (PRODUCT_SECONDS + COPY_SECONDS))


def test_no_product_hides_a_slice_that_a_kernel_copies():
    sliced = f"{COPY}, calls=%slice"
    assert of(sliced, PRODUCT, DONE, config=ANNOTATED) == of(COPY, PRODUCT, DONE)
    found = of(sliced, PRODUCT, DONE, config='backend_config={"wait":[]}')
    assert found.copied == {FROM_HOST: 4 * SIZE, TO_HOST: 0}
    assert found.hidden == {FROM_HOST: 0, TO_HOST: 0}
    assert found.seconds == pytest.approx(4 * (PRODUCT_SECONDS + COPY_SECONDS))


def test_an_asynchronous_slice_on_the_device_counts_once_and_not_as_the_whole_array():
    def seconds(*lines: str) -> float:
        text = MODULE.replace("BODY", "\n".join(lines)).replace("{2,1,0:S(5)}", "{2,1,0}")
        text = text.replace("%body", SLICE.replace("CONFIG", ANNOTATED), 1)
        return forecast(text.replace("{2,1,0:S(5)}", "{2,1,0}"), RATES).seconds

    at_once = f"  %done = {LAYER} fusion(%w, %i), kind=kLoop, calls=%slice"
    found = seconds(f"{COPY}, calls=%slice", DONE)
    assert found == pytest.approx(seconds(at_once))
    assert found == pytest.approx(4 * 2 * SIZE / (MEMORY * RATES.memory))


def test_a_copy_that_is_needed_at_once_hides_behind_nothing():
    found = of(COPY, DONE, PRODUCT)
    assert found.hidden == {FROM_HOST: 0, TO_HOST: 0}
    assert found.seconds == pytest.approx(found.serial_seconds)
    assert found.seconds == pytest.approx(4 * (PRODUCT_SECONDS + COPY_SECONDS))


def test_directions_do_not_wait_for_each_other():
    found = of(COPY, DONE, BACK, PRODUCT, BACK_DONE)
    assert found.copied == {FROM_HOST: 4 * SIZE, TO_HOST: 4 * SIZE}
    assert found.hidden == {FROM_HOST: 0, TO_HOST: 4 * SIZE}


def test_copies_of_one_direction_queue():
    dones = [DONE.replace("%done", f"%done{n}").replace("%start", f"%start{n}") for n in range(8)]
    more = [COPY.replace("%start", f"%start{n}") for n in range(8)]
    found = of(*more, PRODUCT, *dones)
    hidden = int(PRODUCT_SECONDS / COPY_SECONDS)
    assert hidden == 4
    assert found.hidden[FROM_HOST] == 4 * hidden * SIZE
    assert found.seconds == pytest.approx(4 * 8 * COPY_SECONDS)


def test_the_rates_of_an_unknown_device_are_unknown():
    assert rates_of("NVIDIA H100 PCIe") is None
    known = rates_of("NVIDIA H100 80GB HBM3")
    assert known is not None
    assert known.link == 450e9
    assert GPUS["rtx4060"].rates.products == pytest.approx(30.2e12, rel=0.01)


def test_a_layer_from_a_file_is_copied_alone_but_read_beside_computation():
    call = f'  %read = {LAYER} custom-call(%i, %i), custom_call_target="xla_ffi{CALLBACK}"'
    found = of(call, PRODUCT)
    assert found.copied == {FROM_HOST: 4 * SIZE, TO_HOST: 0}
    assert found.hidden == {FROM_HOST: 0, TO_HOST: 0}
    computing = 4 * (PRODUCT_SECONDS + COPY_SECONDS)
    assert found.seconds == found.serial_seconds == pytest.approx(computing)
    text = MODULE.replace("BODY", f"{call}\n{PRODUCT}")
    for share in (0.5, 2):
        disk = int(share * computing * DISK_RATE)
        read = forecast(text, RATES, disk)
        assert read.seconds == pytest.approx(max(1, share) * computing)
        assert read.serial_seconds == pytest.approx((1 + share) * computing)
        assert "(assumes 3 GB/s)" in describe_forecast(read, RATES)
    assert "disk" not in describe_forecast(found, RATES)


def test_a_gather_moves_what_the_other_devices_have():
    gather = "  %gathered = bf16[8192,4096]{1,0} all-gather-start(%y), dimensions={0}"
    done = "  %whole = bf16[8192,4096]{1,0} all-gather-done(%gathered)"
    started = gather.replace(
        "= bf16[8192,4096]{1,0}", "= (bf16[4096,4096]{1,0}, bf16[8192,4096]{1,0})"
    )
    found = of(started, done)
    assert found.seconds == pytest.approx(4 * 2 * SIZE / (LINKS * RATES.link))
