//! The header of a safetensors file: where it lies, and what is wrong with one that cannot be read.

use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::ensure;
use crate::error::Result;
use crate::text::shortened;

/// Longest header accepted, as in the safetensors crate.
const MAX_HEADER: u64 = 100_000_000;

/// The JSON header and where the data begin.
pub(super) fn bytes(file: &[u8]) -> Result<(&[u8], usize)> {
    let length: [u8; 8] = file[..8].try_into().expect("eight bytes");
    let length = u64::from_le_bytes(length);
    ensure!(
        length <= MAX_HEADER,
        "the header claims {length} bytes, more than the {MAX_HEADER} a safetensors file may have; is it one?"
    );
    let end = 8 + usize::try_from(length).expect("at most 10^8");
    ensure!(
        end <= file.len(),
        "the file is cut short: the header needs {length} bytes, the file has {}",
        file.len() - 8
    );
    Ok((&file[8..end], end))
}

/// What is wrong with a header that cannot be read, with the tensor where it is one's.
pub(super) fn fault(header: &[u8], e: &serde_json::Error) -> String {
    let parsed = serde_json::from_slice::<Value>(header);
    let Ok(Value::Object(entries)) = parsed else {
        return parsed
            .map_or_else(|e| e.to_string(), |v| format!("expected a JSON object, found {}", kind_of_json(&v)));
    };
    let counts = |v: &Value| v.as_array().is_some_and(|all| all.iter().all(Value::is_u64));
    for (name, entry) in &entries {
        let named = shortened(name, 80);
        if name == "__metadata__" {
            if !entry.as_object().is_some_and(|all| all.values().all(Value::is_string)) {
                return "__metadata__: expected an object of texts".into();
            }
            continue;
        }
        let wrong = if !entry.is_object() {
            format!("expected an object with dtype, shape and data_offsets, found {}", kind_of_json(entry))
        } else if !counts(&entry["shape"]) {
            format!("expected a shape of whole numbers, found {}", shortened(&entry["shape"].to_string(), 40))
        } else if !(counts(&entry["data_offsets"]) && entry["data_offsets"].as_array().is_some_and(|o| o.len() == 2)) {
            let found = shortened(&entry["data_offsets"].to_string(), 40);
            format!("expected data_offsets of two whole numbers, found {found}")
        } else if serde_json::from_value::<Dtype>(entry["dtype"].clone()).is_err() {
            format!(
                "expected a dtype of safetensors, as F32 or BF16, found {}",
                shortened(&entry["dtype"].to_string(), 40)
            )
        } else {
            continue;
        };
        return format!("{named}: {wrong}");
    }
    // Gaps, overlaps and sizes that do not fit the shapes.
    e.to_string()
}

/// What a JSON value is, in words.
fn kind_of_json(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tensor_at_fault_is_named() {
        let said = |header: &str| {
            let e = serde_json::from_str::<safetensors::tensor::Metadata>(header).unwrap_err();
            fault(header.as_bytes(), &e)
        };
        let good = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        let second = |entry: &str| said(&format!(r#"{{"a.weight":{good},"b.weight":{entry}}}"#));
        assert_eq!(second("7"), "b.weight: expected an object with dtype, shape and data_offsets, found a number");
        let entry = r#"{"dtype":"F32","shape":[1,-2],"data_offsets":[4,8]}"#;
        assert_eq!(second(entry), "b.weight: expected a shape of whole numbers, found [1,-2]");
        let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[4]}"#;
        assert_eq!(second(entry), "b.weight: expected data_offsets of two whole numbers, found [4]");
        let entry = r#"{"dtype":"F33","shape":[1],"data_offsets":[4,8]}"#;
        assert_eq!(second(entry), "b.weight: expected a dtype of safetensors, as F32 or BF16, found \"F33\"");
        assert_eq!(said(r#"{"__metadata__":7}"#), "__metadata__: expected an object of texts");
        assert_eq!(said("[]"), "expected a JSON object, found a list");
        let gap = r#"{"dtype":"F32","shape":[1],"data_offsets":[8,12]}"#;
        assert!(second(gap).contains("b.weight"), "{}", second(gap));
    }
}
