"""Declares the C functions of ggml that edgert calls: results and arguments, nothing more."""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from typing import Any

from edgert.errors import NativeLibraryError
from edgert.ggml.abi import ComputePlan, InitParams, check_layout
from edgert.ggml.library import Libraries, load_libraries

_log = logging.getLogger("edgert.ggml")
_P, _I, _L, _N, _F = c_void_p, c_int, c_int64, c_size_t, c_float

# name: (result, arguments). An operation takes the context first and gives a tensor.
_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [_P, _P]),
    "ggml_init": (_P, [InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_tensor_overhead": (_N, []),
    "ggml_graph_overhead_custom": (_N, [_N, c_bool]),
    "ggml_new_graph_custom": (_P, [_P, _N, c_bool]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_graph_n_nodes": (_I, [_P]),
    "ggml_new_tensor_1d": (_P, [_P, _I, _L]),
    "ggml_new_tensor_2d": (_P, [_P, _I, _L, _L]),
    "ggml_new_tensor_3d": (_P, [_P, _I, _L, _L, _L]),
    "ggml_new_tensor_4d": (_P, [_P, _I, _L, _L, _L, _L]),
    "ggml_set_name": (_P, [_P, c_char_p]),
    "ggml_get_data": (_P, [_P]),
    "ggml_nbytes": (_N, [_P]),
    "ggml_row_size": (_N, [_I, _L]),
    "ggml_type_size": (_N, [_I]),
    "ggml_blck_size": (_L, [_I]),
    "ggml_is_quantized": (c_bool, [_I]),
    "ggml_set_input": (None, [_P]),
    "ggml_set_output": (None, [_P]),
    "ggml_add": (_P, [_P, _P, _P]),
    "ggml_mul": (_P, [_P, _P, _P]),
    "ggml_mul_inplace": (_P, [_P, _P, _P]),
    "ggml_div": (_P, [_P, _P, _P]),
    "ggml_scale": (_P, [_P, _P, _F]),
    "ggml_clamp": (_P, [_P, _P, _F, _F]),
    "ggml_tanh": (_P, [_P, _P]),
    "ggml_sigmoid": (_P, [_P, _P]),
    "ggml_soft_max": (_P, [_P, _P]),
    "ggml_soft_max_ext": (_P, [_P, _P, _P, _F, _F]),
    "ggml_sum_rows": (_P, [_P, _P]),
    "ggml_argsort_top_k": (_P, [_P, _P, _I]),
    "ggml_rms_norm": (_P, [_P, _P, _F]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_mul_mat_id": (_P, [_P, _P, _P, _P]),
    "ggml_mul_mat_set_hint": (None, [_P, _I]),
    "ggml_swiglu_split": (_P, [_P, _P, _P]),
    "ggml_geglu_split": (_P, [_P, _P, _P]),
    "ggml_reglu_split": (_P, [_P, _P, _P]),
    "ggml_get_rows": (_P, [_P, _P, _P]),
    "ggml_set_rows": (_P, [_P, _P, _P, _P]),
    "ggml_cont": (_P, [_P, _P]),
    "ggml_cpy": (_P, [_P, _P, _P]),
    "ggml_reshape_2d": (_P, [_P, _P, _L, _L]),
    "ggml_reshape_3d": (_P, [_P, _P, _L, _L, _L]),
    "ggml_view_1d": (_P, [_P, _P, _L, _N]),
    "ggml_view_2d": (_P, [_P, _P, _L, _L, _N, _N]),
    "ggml_view_3d": (_P, [_P, _P, _L, _L, _L, _N, _N, _N]),
    "ggml_permute": (_P, [_P, _P, _I, _I, _I, _I]),
    "ggml_rope_ext": (_P, [_P, _P, _P, _P, _I, _I, _I, _F, _F, _F, _F, _F, _F]),
    "ggml_flash_attn_ext": (_P, [_P, _P, _P, _P, _P, _F, _F, _F]),
    "ggml_prec_set_acc": (c_bool, [_P, _I]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_name": (c_char_p, [_P]),
    "ggml_backend_get_device": (_P, [_P]),
    "ggml_backend_get_default_buffer_type": (_P, [_P]),
    "ggml_backend_graph_compute": (_I, [_P, _P]),
    "ggml_backend_alloc_buffer": (_P, [_P, _N]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_buffer_get_base": (_P, [_P]),
    "ggml_backend_buffer_get_size": (_N, [_P]),
    "ggml_backend_buffer_set_usage": (None, [_P, _I]),
    "ggml_backend_buft_alloc_buffer": (_P, [_P, _N]),
    "ggml_backend_buft_get_alignment": (_N, [_P]),
    "ggml_backend_buft_get_alloc_size": (_N, [_P, _P]),
    "ggml_backend_buft_is_host": (c_bool, [_P]),
    "ggml_backend_buft_name": (c_char_p, [_P]),
    "ggml_backend_tensor_alloc": (_I, [_P, _P, _P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _N, _N]),
    "ggml_backend_tensor_get": (None, [_P, _P, _N, _N]),
    "ggml_backend_dev_supports_op": (c_bool, [_P, _P]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_dev_name": (c_char_p, [_P]),
    "ggml_backend_dev_description": (c_char_p, [_P]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, c_char_p]),
    "ggml_backend_cpu_buffer_from_ptr": (_P, [_P, _N]),
    "ggml_gallocr_new": (_P, [_P]),
    "ggml_gallocr_free": (None, [_P]),
    "ggml_gallocr_alloc_graph": (c_bool, [_P, _P]),
    "ggml_gallocr_reserve_n_size": (None, [_P, _P, _P, _P, _P]),
    "ggml_gallocr_get_buffer_size": (_N, [_P, _I]),
}
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, _I]),
    "ggml_backend_cpu_set_abort_callback": (None, [_P, _P, _P]),
    "ggml_get_type_traits_cpu": (_P, [_I]),
    "ggml_graph_plan": (ComputePlan, [_P, _I, _P]),
}


@ctypes.CFUNCTYPE(None, _I, c_char_p, _P)  # type: ignore[untyped-decorator]
def _forward_log(level: int, text: bytes, _data: int) -> None:
    """ggml's own messages, such as one line for each repacked tensor, belong to the most detailed log."""
    _log.debug("%s", text.decode(errors="replace").rstrip())


def _declare(library: ctypes.CDLL, table: dict[str, tuple[Any, list[Any]]]) -> None:
    for name, (result, arguments) in table.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise NativeLibraryError(f"ggml has no function {name}",
                                     "Install the version that edgert knows: pip install llama-cpp-python==0.3.36."
                                     ) from error
        function.restype, function.argtypes = result, arguments


@cache
def ggml() -> Libraries:
    """The libraries with every used function declared and the structure layout checked."""
    libraries = load_libraries()
    _declare(libraries.base, _BASE)
    _declare(libraries.cpu, _CPU)
    libraries.base.ggml_log_set(_forward_log, None)
    check_layout(libraries)
    return libraries
