//! The extension module `fastsal._core`: borrow arrays, release the GIL, call the core, wrap.
//!
//! One file per core module. Everything that sees a module, a device, a file or a person is Python.

mod accumulate;
mod arrays;
mod compensate;
mod dual;
mod errors;
mod greedy;
mod inverse;
mod isa;
mod parallel;
mod patterns;
mod select;

use pyo3::prelude::*;

/// Compiled core of fastsal; called by the package, not by users.
#[pymodule]
#[pyo3(name = "_core")]
mod core {
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::isa::check(module.py())
    }
    #[pymodule_export]
    use crate::accumulate::{accumulate, largest, packed_len};
    #[pymodule_export]
    use crate::compensate::compensate;
    #[pymodule_export]
    use crate::dual::dual_inverse_diagonal;
    #[pymodule_export]
    use crate::errors::{LargeRowError, NanScoreError, NonFiniteRowError};
    #[pymodule_export]
    use crate::greedy::eliminate;
    #[pymodule_export]
    use crate::inverse::{blocks, diagonal, inverse, inverse_diagonal};
    #[pymodule_export]
    use crate::isa::instruction_sets;
    #[pymodule_export]
    const ROWS_PER_STEP: usize = fastsal_core::accumulate::ROWS_PER_STEP;
    #[pymodule_export]
    use crate::parallel::{build_info, num_threads, set_num_threads};
    #[pymodule_export]
    use crate::patterns::{group_costs, n_of_m_joint};
    #[pymodule_export]
    use crate::select::{
        count_keys, kth_smallest, mask_below, n_of_m, prune_smallest, score_of_key,
    };
}
