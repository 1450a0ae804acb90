//! NumPy arrays as the slices that the core takes; nothing is copied.

use fastsal_core::statistics::{Packed, Statistics};
use fastsal_core::{AnyRows, Element, Layout, Rows};
use half::{bf16, f16};
use numpy::{
    PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::errors::to_python;

/// Packed sums in one of the two precisions.
pub enum Floats<'py> {
    F32(PyReadonlyArray1<'py, f32>),
    F64(PyReadonlyArray1<'py, f64>),
}

impl<'a, 'py> FromPyObject<'a, 'py> for Floats<'py> {
    type Error = PyErr;
    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(a) = object.extract() {
            return Ok(Self::F32(a));
        }
        object
            .extract()
            .map(Self::F64)
            .map_err(|_| must_be("array", "a float32 or float64 array [n]", "another type"))
    }
}

/// Sums to be written.
pub enum FloatsMut<'py> {
    F32(PyReadwriteArray1<'py, f32>),
    F64(PyReadwriteArray1<'py, f64>),
}

impl<'a, 'py> FromPyObject<'a, 'py> for FloatsMut<'py> {
    type Error = PyErr;
    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(a) = object.extract() {
            return Ok(Self::F32(a));
        }
        object.extract().map(Self::F64).map_err(|_| {
            must_be("array", "a writable float32 or float64 array [n]", "another type")
        })
    }
}

/// One parameter: (packed sums, d, samples, kept or None).
pub type Parameter<'py> = (Floats<'py>, usize, f64, Option<PyReadonlyArray1<'py, bool>>);

/// About how many nanoseconds it takes to factor and invert the blocks of parameters.
pub fn cubes(parameters: &[Parameter<'_>], block_size: usize) -> u64 {
    let cube = |(_, d, ..): &Parameter<'_>| {
        let block = block_size.min(*d) as u64;
        // Four products in a nanosecond.
        (*d as u64).saturating_mul(block.saturating_mul(block) / 4 + 8)
    };
    parameters.iter().map(cube).fold(0, u64::saturating_add)
}

/// Borrow the statistics of a parameter.
pub fn statistics<'a>(parameter: &'a Parameter<'_>, block_size: usize) -> PyResult<Statistics<'a>> {
    let (packed, d, samples, kept) = parameter;
    let packed = match packed {
        Floats::F32(a) => Packed::F32(slice("packed", a)?),
        Floats::F64(a) => Packed::F64(slice("packed", a)?),
    };
    let kept = optional("kept", kept.as_ref())?;
    Layout::new(*d, block_size)
        .and_then(|layout| Statistics::new(layout, packed, *samples, kept))
        .map_err(to_python)
}

/// Gradients `[n, d]`. PyTorch's 16-bit floats come as uint16 arrays with their name.
pub enum Gradients<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    F64(PyReadonlyArray2<'py, f64>),
    F16(PyReadonlyArray2<'py, u16>),
    Bf16(PyReadonlyArray2<'py, u16>),
}

impl<'py> Gradients<'py> {
    /// `dtype` is PyTorch's name of the element type.
    pub fn new(array: &Bound<'py, PyAny>, dtype: &str) -> PyResult<Self> {
        let fits =
            |_| must_be("gradients", "an array [n, d] of the type of `dtype`", "another type");
        match dtype {
            "float32" => array.extract().map(Self::F32).map_err(fits),
            "float64" => array.extract().map(Self::F64).map_err(fits),
            "float16" => array.extract().map(Self::F16).map_err(fits),
            "bfloat16" => array.extract().map(Self::Bf16).map_err(fits),
            _ => Err(must_be("dtype", "float32, float64, float16 or bfloat16", dtype)),
        }
    }

    /// Borrow the rows.
    pub fn rows(&self) -> PyResult<AnyRows<'_>> {
        Ok(match self {
            Self::F32(a) => rows::<f32, f32>(a)?.into(),
            Self::F64(a) => rows::<f64, f64>(a)?.into(),
            Self::F16(a) => rows::<u16, f16>(a)?.into(),
            Self::Bf16(a) => rows::<u16, bf16>(a)?.into(),
        })
    }
}

/// An element type that an array of `A` holds, bit for bit.
trait StoredAs<A>: Element {}
impl StoredAs<f32> for f32 {}
impl StoredAs<f64> for f64 {}
impl StoredAs<u16> for f16 {}
impl StoredAs<u16> for bf16 {}

/// Borrow rows whose elements are contiguous; the rows themselves may be apart.
fn rows<'a, A: numpy::Element, E: StoredAs<A>>(
    array: &'a PyReadonlyArray2<'_, A>,
) -> PyResult<Rows<'a, E>> {
    let (n, d) = (array.shape()[0], array.shape()[1]);
    let size = size_of::<A>() as isize;
    let (stride, inner) = (array.strides()[0], array.strides()[1]);
    if (inner != size && d > 1) || (n > 1 && (stride < 0 || stride % size != 0)) {
        return Err(must_be("gradients", "rows [n, d] with contiguous elements", "other strides"));
    }
    let stride = if n > 1 { (stride / size) as usize } else { d };
    let len = if n == 0 || d == 0 { 0 } else { (n - 1) * stride + d };
    // SAFETY: the array owns (or keeps alive) the memory from its first to its last element, which by
    // its shape and its strides, both not negative, is at offset len - 1; it is borrowed read-only
    // for 'a; E has the size and alignment of A, and any bits are a value of it.
    let data = unsafe { std::slice::from_raw_parts(array.as_array().as_ptr().cast::<E>(), len) };
    Rows::new(data, n, d, stride).map_err(to_python)
}

/// Borrow a one-dimensional array as a slice.
pub fn slice<'a, T: numpy::Element>(
    what: &str,
    array: &'a PyReadonlyArray1<'_, T>,
) -> PyResult<&'a [T]> {
    array.as_slice().map_err(|_| not_contiguous(what))
}

/// The same, or none.
pub fn optional<'a, T: numpy::Element>(
    what: &str,
    array: Option<&'a PyReadonlyArray1<'_, T>>,
) -> PyResult<Option<&'a [T]>> {
    array.map(|a| slice(what, a)).transpose()
}

/// Borrow a one-dimensional array as a slice to be written.
pub fn slice_mut<'a, T: numpy::Element>(
    what: &str,
    array: &'a mut PyReadwriteArray1<'_, T>,
) -> PyResult<&'a mut [T]> {
    array.as_slice_mut().map_err(|_| not_contiguous(what))
}

/// Pass results to Python.
pub fn to_numpy<T: numpy::Element>(py: Python<'_>, values: Vec<T>) -> Bound<'_, PyArray1<T>> {
    PyArray1::from_vec(py, values)
}

/// The error for an argument of the wrong type.
pub fn must_be(what: &str, expected: &str, got: &str) -> PyErr {
    PyTypeError::new_err(format!("{what} must be {expected}, got {got}"))
}

fn not_contiguous(what: &str) -> PyErr {
    PyValueError::new_err(format!("{what} must be contiguous, got a strided array"))
}
