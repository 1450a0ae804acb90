//! NumPy arrays as the slices that the core takes; nothing is copied.

use fastsal_core::{Element, Rows};
use half::{bf16, f16};
use numpy::{
    PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::errors::to_python;

/// Statistics or rows in one of the two precisions.
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
        object.extract().map(Self::F64).map_err(|_| wants("a float32 or float64 array [n]"))
    }
}

/// Statistics to be written.
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
        object
            .extract()
            .map(Self::F64)
            .map_err(|_| wants("a writable float32 or float64 array [n]"))
    }
}

/// Gradient rows `[n, d]`. PyTorch's 16-bit floats come as uint16 arrays with their name.
pub enum AnyRows<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    F64(PyReadonlyArray2<'py, f64>),
    F16(PyReadonlyArray2<'py, u16>),
    Bf16(PyReadonlyArray2<'py, u16>),
}

impl<'py> AnyRows<'py> {
    /// `dtype` is PyTorch's name of the element type.
    pub fn new(array: &Bound<'py, PyAny>, dtype: &str) -> PyResult<Self> {
        let fits = |_| wants("rows [n, d] whose array type fits `dtype`");
        match dtype {
            "float32" => array.extract().map(Self::F32).map_err(fits),
            "float64" => array.extract().map(Self::F64).map_err(fits),
            "float16" => array.extract().map(Self::F16).map_err(fits),
            "bfloat16" => array.extract().map(Self::Bf16).map_err(fits),
            _ => Err(wants("dtype float32, float64, float16 or bfloat16")),
        }
    }
}

/// Run `$body` with `$rows: Rows<E>` for the element type that came.
macro_rules! with_rows {
    ($any:expr, $rows:ident => $body:expr) => {
        match $any {
            $crate::arrays::AnyRows::F32(a) => {
                let $rows = $crate::arrays::rows::<f32, f32>(a)?;
                $body
            }
            $crate::arrays::AnyRows::F64(a) => {
                let $rows = $crate::arrays::rows::<f64, f64>(a)?;
                $body
            }
            $crate::arrays::AnyRows::F16(a) => {
                let $rows = $crate::arrays::rows::<u16, half::f16>(a)?;
                $body
            }
            $crate::arrays::AnyRows::Bf16(a) => {
                let $rows = $crate::arrays::rows::<u16, half::bf16>(a)?;
                $body
            }
        }
    };
}
pub(crate) use with_rows;

/// An element type that an array of `A` holds, bit for bit.
pub trait StoredAs<A>: Element {}
impl StoredAs<f32> for f32 {}
impl StoredAs<f64> for f64 {}
impl StoredAs<u16> for f16 {}
impl StoredAs<u16> for bf16 {}

/// Borrow rows whose elements lie side by side; the rows themselves may lie apart.
pub fn rows<'a, A: numpy::Element, E: StoredAs<A>>(
    array: &'a PyReadonlyArray2<'_, A>,
) -> PyResult<Rows<'a, E>> {
    let (n, d) = (array.shape()[0], array.shape()[1]);
    let size = size_of::<A>() as isize;
    let (stride, inner) = (array.strides()[0], array.strides()[1]);
    if (inner != size && d > 1) || (n > 1 && (stride < 0 || stride % size != 0)) {
        return Err(wants("rows [n, d] whose elements lie side by side"));
    }
    let stride = if n > 1 { (stride / size) as usize } else { d };
    let len = if n == 0 || d == 0 { 0 } else { (n - 1) * stride + d };
    // SAFETY: the array owns (or keeps alive) memory from its first to its last element, which the
    // shape and the strides, both not negative, put at offset len - 1; it is borrowed read-only for
    // 'a; E has the size and alignment of A, and any bits are a value of it.
    let data = unsafe { std::slice::from_raw_parts(array.as_array().as_ptr().cast::<E>(), len) };
    Rows::new(data, n, d, stride).map_err(to_python)
}

/// A one-dimensional array as a slice.
pub fn slice<'a, T: numpy::Element>(
    what: &str,
    array: &'a PyReadonlyArray1<'_, T>,
) -> PyResult<&'a [T]> {
    array.as_slice().map_err(|_| PyValueError::new_err(format!("{what}: must be contiguous")))
}

/// The same, or none.
pub fn optional<'a, T: numpy::Element>(
    what: &str,
    array: Option<&'a PyReadonlyArray1<'_, T>>,
) -> PyResult<Option<&'a [T]>> {
    array.map(|a| slice(what, a)).transpose()
}

/// A one-dimensional array as a slice to be written.
pub fn slice_mut<'a, T: numpy::Element>(
    what: &str,
    array: &'a mut PyReadwriteArray1<'_, T>,
) -> PyResult<&'a mut [T]> {
    array.as_slice_mut().map_err(|_| PyValueError::new_err(format!("{what}: must be contiguous")))
}

/// Hand results over to Python.
pub fn to_numpy<T: numpy::Element>(py: Python<'_>, values: Vec<T>) -> Bound<'_, PyArray1<T>> {
    PyArray1::from_vec(py, values)
}

fn wants(expected: &str) -> PyErr {
    PyTypeError::new_err(format!("expected {expected}"))
}
