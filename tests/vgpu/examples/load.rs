//! Loads PTX files and says which kernels they hold or why one is refused: `cargo run --example load -- FILE...`.

fn main() {
    let mut failed = false;
    for path in std::env::args().skip(1) {
        let loaded = std::fs::read_to_string(&path)
            .map_err(|e| e.to_string())
            .and_then(|t| vgpu::Module::load(&t, &mut vgpu::Memory::new()).map_err(|e| e.to_string()));
        match loaded {
            Ok(m) => println!("{path}: {}", m.kernels().collect::<Vec<_>>().join(" ")),
            Err(e) => {
                println!("{path}: {e}");
                failed = true;
            }
        }
    }
    std::process::exit(i32::from(failed));
}
