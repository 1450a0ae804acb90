//! NumPy arrays as the slices that the core takes; only masks are copied.

use fastsal_core::memory::zeros;
use fastsal_core::statistics::{Packed, Statistics};
use fastsal_core::{AnyRows, Element, Layout, Rows};
use half::{bf16, f16};
use numpy::ndarray::{Dimension, Ix1, Ix2};
use numpy::{
    BorrowError, PyArray, PyArray1, PyArrayDescrMethods, PyArrayMethods, PyReadonlyArray,
    PyReadonlyArray2, PyReadwriteArray1, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::errors::to_python;

/// An array `[n]` to be read.
pub struct Array<'py, T: numpy::Element>(PyReadonlyArray<'py, T, Ix1>);

impl<'a, 'py, T: numpy::Element> FromPyObject<'a, 'py> for Array<'py, T> {
    type Error = PyErr;
    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        read(&object)?.map(Self).ok_or_else(|| {
            let expected = format!("a {} array [n]", T::get_dtype(object.py()));
            must_be("array", &expected, &found(&object))
        })
    }
}

/// Packed sums in one of the two precisions.
pub enum Floats<'py> {
    F32(Array<'py, f32>),
    F64(Array<'py, f64>),
}

impl<'a, 'py> FromPyObject<'a, 'py> for Floats<'py> {
    type Error = PyErr;
    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Some(array) = read(&object)? {
            return Ok(Self::F32(Array(array)));
        }
        let double = read(&object)?.map(|array| Self::F64(Array(array)));
        double.ok_or_else(|| must_be("array", "a float32 or float64 array [n]", &found(&object)))
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
        if let Ok(array) = object.cast::<PyArray1<f32>>() {
            return array.try_readwrite().map(Self::F32).map_err(refused);
        }
        if let Ok(array) = object.cast::<PyArray1<f64>>() {
            return array.try_readwrite().map(Self::F64).map_err(refused);
        }
        Err(must_be("array", "a writable float32 or float64 array [n]", &found(&object)))
    }
}

impl FloatsMut<'_> {
    /// Where the array lies.
    pub fn span(&self) -> Span {
        match self {
            Self::F32(array) => Span::of(array),
            Self::F64(array) => Span::of(array),
        }
    }
}

/// A mask `[n]`, true = kept. Any byte but zero is true, as PyTorch and NumPy can view bytes as
/// booleans: it is read as bytes, and copied.
pub struct Mask(Vec<bool>);

impl<'a, 'py> FromPyObject<'a, 'py> for Mask {
    type Error = PyErr;
    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let Some(array) = read::<bool, Ix1>(&object)? else {
            return Err(must_be("array", "a bool array [n]", &found(&object)));
        };
        let (first, stride) = (array.data().cast::<u8>().cast_const(), array.strides()[0]);
        let mut kept = zeros("a mask", array.len()).map_err(to_python)?;
        for (i, kept) in kept.iter_mut().enumerate() {
            // SAFETY: the array keeps its memory alive, and its byte `i` is there by its shape and its
            // stride; a byte is a value of `u8`, whatever it is.
            *kept = unsafe { first.offset(i as isize * stride).read() } != 0;
        }
        Ok(Self(kept))
    }
}

impl Mask {
    /// Borrow the mask.
    pub fn as_slice(&self) -> &[bool] {
        &self.0
    }
}

/// One parameter: (packed sums, d, samples, kept or None).
pub type Parameter<'py> = (Floats<'py>, usize, f64, Option<Mask>);

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
    let kept = kept.as_ref().map(Mask::as_slice);
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
        let (given, stored) = match dtype {
            "float32" => (read(array)?.map(Self::F32), dtype),
            "float64" => (read(array)?.map(Self::F64), dtype),
            "float16" => (read(array)?.map(Self::F16), "uint16"),
            "bfloat16" => (read(array)?.map(Self::Bf16), "uint16"),
            _ => return Err(must_be("dtype", "float32, float64, float16 or bfloat16", dtype)),
        };
        given
            .ok_or_else(|| must_be("gradients", &format!("a {stored} array [n, d]"), &found(array)))
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

    /// Where each row lies.
    pub fn spans(&self) -> impl Iterator<Item = Span> {
        let (first, n, stride) = match self {
            Self::F32(a) => Span::of_rows(a),
            Self::F64(a) => Span::of_rows(a),
            Self::F16(a) | Self::Bf16(a) => Span::of_rows(a),
        };
        (0..n).map(move |r| Span { start: first.start.wrapping_add(r * stride), ..first })
    }
}

/// An element type that an array of `A` holds, bit for bit.
///
/// # Safety
/// The type has the size and the alignment of `A`, and any bits are a value of it.
unsafe trait StoredAs<A>: Element {}
// SAFETY: the same type; any bits are a float.
unsafe impl StoredAs<f32> for f32 {}
// SAFETY: as above.
unsafe impl StoredAs<f64> for f64 {}
// SAFETY: a transparent wrapper of u16.
unsafe impl StoredAs<u16> for f16 {}
// SAFETY: as above.
unsafe impl StoredAs<u16> for bf16 {}

/// Borrow rows whose elements are contiguous; the rows themselves may be apart.
fn rows<'a, A: numpy::Element, E: StoredAs<A>>(
    array: &'a PyReadonlyArray2<'_, A>,
) -> PyResult<Rows<'a, E>> {
    let (n, d) = (array.shape()[0], array.shape()[1]);
    let size = size_of::<A>() as isize;
    let (stride, inner) = (array.strides()[0], array.strides()[1]);
    if n == 0 || d == 0 {
        return Rows::new(&[], n, d, d).map_err(to_python);
    }
    if !array.is_aligned() {
        return Err(misaligned("gradients"));
    }
    if (inner != size && d > 1) || (n > 1 && (stride < 0 || stride % size != 0)) {
        let expected = "rows [n, d] with contiguous elements";
        return Err(must_have("gradients", expected, "other strides"));
    }
    let stride = if n > 1 { (stride / size) as usize } else { d };
    // Neither operation wraps: the array is in memory.
    let len = (n - 1) * stride + d;
    // SAFETY: the array owns (or keeps alive) the memory from its first to its last element, which by
    // its shape and its strides, both not negative, is at offset len - 1; it is aligned, and borrowed
    // read-only for 'a; E has the size and alignment of A, and any bits are a value of it.
    let data = unsafe { std::slice::from_raw_parts(array.data().cast_const().cast::<E>(), len) };
    Rows::new(data, n, d, stride).map_err(to_python)
}

/// Borrow a one-dimensional array as a slice.
pub fn slice<'a, T: numpy::Element>(what: &str, array: &'a Array<'_, T>) -> PyResult<&'a [T]> {
    array.0.as_slice().map_err(|_| not_a_slice(what, &array.0))
}

/// Borrow one-dimensional arrays as slices.
pub fn slices<'a, T: numpy::Element>(
    what: &str,
    arrays: &'a [Array<'_, T>],
) -> PyResult<Vec<&'a [T]>> {
    arrays.iter().map(|array| slice(what, array)).collect()
}

/// Borrow a one-dimensional array as a slice to be written.
pub fn slice_mut<'a, T: numpy::Element>(
    what: &str,
    array: &'a mut PyReadwriteArray1<'_, T>,
) -> PyResult<&'a mut [T]> {
    if !array.is_aligned() || !array.is_contiguous() {
        return Err(not_a_slice(what, array));
    }
    array.as_slice_mut().map_err(|_| misaligned(what))
}

/// The memory of contiguous elements.
#[derive(Clone, Copy)]
pub struct Span {
    start: usize,
    bytes: usize,
}

impl Span {
    fn of<T: numpy::Element>(array: &Bound<'_, PyArray<T, Ix1>>) -> Self {
        Self { start: array.data().addr(), bytes: array.len() * size_of::<T>() }
    }

    /// The first row of an array `[n, d]`, the number of rows that differ, and from one to the next.
    fn of_rows<T: numpy::Element>(array: &Bound<'_, PyArray<T, Ix2>>) -> (Self, usize, usize) {
        let (n, stride) = (array.shape()[0], array.strides()[0] as usize);
        let bytes = array.shape()[1] * size_of::<T>();
        let n = if stride == 0 { n.min(1) } else { n };
        (Self { start: array.data().addr(), bytes }, n, stride)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let apart = |a: &Self, b: &Self| a.start.saturating_add(a.bytes) <= b.start;
        self.bytes > 0 && other.bytes > 0 && !apart(self, other) && !apart(other, self)
    }
}

/// Require that what is written lies apart from what is read, and from the rest that is written. NumPy
/// arrays that do not know of each other can share memory.
pub fn check_apart(
    rows: &Gradients<'_>,
    packed: &FloatsMut<'_>,
    sums: &FloatsMut<'_>,
) -> PyResult<()> {
    let (packed, sums) = (packed.span(), sums.span());
    let overlap = "memory of its own";
    if packed.overlaps(&sums) {
        return Err(must_have("sums", overlap, "a view of packed"));
    }
    for row in rows.spans() {
        for (what, span) in [("packed", &packed), ("sums", &sums)] {
            if row.overlaps(span) {
                return Err(must_have(what, overlap, "a view of rows"));
            }
        }
    }
    Ok(())
}

/// Require that a list has an item for each parameter.
pub fn check_count(what: &str, count: usize, parameters: usize) -> PyResult<()> {
    if count == parameters {
        return Ok(());
    }
    let expected = format!("an item for each of the {parameters} parameters");
    Err(must_have(what, &expected, &count.to_string()))
}

/// Pass results to Python.
pub fn to_numpy<T: numpy::Element>(py: Python<'_>, values: Vec<T>) -> Bound<'_, PyArray1<T>> {
    PyArray1::from_vec(py, values)
}

/// Make a one-dimensional array of zeros, in memory of NumPy, which asks for huge pages: the system
/// takes longer to hand out many small ones than a mask to be written.
pub fn numpy_zeros<T: numpy::Element>(
    py: Python<'_>,
    len: usize,
) -> PyResult<Bound<'_, PyArray1<T>>> {
    let array = py.import("numpy")?.call_method1("zeros", (len, T::get_dtype(py)))?;
    Ok(array.cast_into()?)
}

/// The error for an argument of the wrong type.
pub fn must_be(what: &str, expected: &str, got: &str) -> PyErr {
    PyTypeError::new_err(format!("{what} must be {expected}, got {got}"))
}

/// The error for an array of the right type that cannot be used.
fn must_have(what: &str, expected: &str, got: &str) -> PyErr {
    PyValueError::new_err(format!("{what} must have {expected}, got {got}"))
}

fn misaligned(what: &str) -> PyErr {
    must_have(what, "the alignment of its type", "an address that is not a multiple of it")
}

fn not_a_slice<T: numpy::Element>(what: &str, array: &Bound<'_, PyArray<T, Ix1>>) -> PyErr {
    if array.is_aligned() {
        return must_have(what, "contiguous elements", "a strided array");
    }
    misaligned(what)
}

/// Borrow an array; none where it has another type or another number of axes.
fn read<'py, T: numpy::Element, D: Dimension>(
    object: &Bound<'py, PyAny>,
) -> PyResult<Option<PyReadonlyArray<'py, T, D>>> {
    let Ok(array) = object.cast::<PyArray<T, D>>() else { return Ok(None) };
    array.try_readonly().map(Some).map_err(refused)
}

/// The error for an array of the right type that cannot be borrowed.
fn refused(error: BorrowError) -> PyErr {
    match error {
        BorrowError::NotWriteable => must_have("array", "writable memory", "a read-only array"),
        _ => must_have("array", "memory that no other argument or call uses", "one that is in use"),
    }
}

/// What an object is, in a few words.
fn found(object: &Bound<'_, PyAny>) -> String {
    match object.cast::<PyUntypedArray>() {
        Ok(array) => {
            let order = if array.dtype().is_native_byteorder() == Some(false) {
                "byte-swapped "
            } else {
                ""
            };
            format!("a {order}{} array {:?}", array.dtype(), array.shape())
        }
        Err(_) => object.get_type().name().map_or_else(|_| "an object".into(), |n| n.to_string()),
    }
}
