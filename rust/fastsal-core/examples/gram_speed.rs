//! Throwaway timing.
use fastsal_core::*;
use std::time::Instant;
fn main() {
    let a: Vec<usize> = std::env::args().skip(1).map(|s| s.parse().unwrap()).collect();
    let (n, logd) = (a[0], a[1]);
    let d = 1 << logd;
    let data: Vec<f32> =
        (0..n * d).map(|i| ((i * 2654435761usize % 1000) as f32 - 500.0) * 1e-3).collect();
    for b in [64, 128] {
        let l = Layout::new(d, b);
        let mut p = vec![0f32; l.packed_len()];
        let mut s = vec![0f32; d];
        for isa in [Isa::best()] {
            let mut best = f64::MAX;
            for _ in 0..(7 * (1 << 22) / d).min(3000) {
                let t = Instant::now();
                gram::accumulate_with(isa, l, Rows::new(&data, n, d, d).unwrap(), &mut p, &mut s)
                    .unwrap();
                best = best.min(t.elapsed().as_secs_f64());
            }
            println!(
                "n={n} d=2^{logd} B={b} {:10} {:.4}s useful {:.1} GFLOP/s",
                isa.name(),
                best,
                (n * d * (b + 1)) as f64 / best / 1e9
            );
        }
    }
}
