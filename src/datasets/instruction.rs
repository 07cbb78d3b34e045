//! Dolly 15k and Alpaca: records of an instruction, an optional text it refers to, and an answer.

use serde_json::Value;

use super::rows::{Collected, Row, field};

/// Names of the three fields of an instruction data set.
#[derive(Clone, Copy, Debug)]
pub struct Fields {
    /// What to do.
    pub instruction: &'static str,
    /// The text it refers to; joined into the prompt below the instruction.
    pub context: &'static str,
    /// The answer.
    pub response: &'static str,
}

/// databricks-dolly-15k.
pub const DOLLY: Fields = Fields { instruction: "instruction", context: "context", response: "response" };

/// alpaca_data.json and its Parquet form.
pub const ALPACA: Fields = Fields { instruction: "instruction", context: "input", response: "output" };

/// Converts all records; `prompt = instruction`, a blank line, `context` where there is one.
///
/// # Errors
/// The first record that is not an object or has a field of another type, by its number from 1.
pub fn convert(records: &[Value], fields: Fields) -> Result<Collected, String> {
    let mut out = Collected::default();
    for (i, record) in records.iter().enumerate() {
        let get = |key| field(record, key).map_err(|e| format!("record {}: {e}", i + 1));
        if !record.is_object() {
            return Err(format!("record {}: expected an object, found {}", i + 1, super::rows::kind(record)));
        }
        let (instruction, mut context, response) =
            (get(fields.instruction)?, get(fields.context)?, get(fields.response)?);
        // Alpaca's generator wrote this where it meant "no input".
        if context.eq_ignore_ascii_case("<noinput>") {
            context.clear();
        }
        if instruction.is_empty() {
            out.drop("empty instruction");
        } else if response.is_empty() {
            out.drop("empty response");
        } else {
            let prompt = if context.is_empty() { instruction } else { format!("{instruction}\n\n{context}") };
            out.keep(Row::Pair { prompt, response });
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn context_is_joined_and_blank_fields_are_counted() {
        let records = [
            json!({"instruction": " Sum up. ", "context": "a\r\nb ", "response": "ab\n", "category": "x"}),
            json!({"instruction": "Sum up.", "context": "  \n", "response": "ab"}),
            json!({"instruction": "Sum up.", "context": null, "response": "ab"}),
            json!({"instruction": "", "context": "", "response": "ab"}),
            json!({"instruction": "Say nothing.", "response": ""}),
        ];
        let got = convert(&records, DOLLY).unwrap();
        assert_eq!(
            got.rows,
            [("Sum up.\n\na\nb", "ab"), ("Sum up.", "ab")]
                .map(|(p, r)| Row::Pair { prompt: p.to_string(), response: r.to_string() })
        );
        let dropped: Vec<_> = got.dropped.into_iter().collect();
        assert_eq!(dropped, [("duplicate", 1), ("empty instruction", 1), ("empty response", 1)]);
    }

    #[test]
    fn wrong_types_name_the_record() {
        let e = convert(&[json!({"instruction": 5, "output": "x"})], ALPACA).unwrap_err();
        assert_eq!(e, "record 1: field \"instruction\": expected a string, found a number");
        assert!(
            convert(&[json!([1])], ALPACA).unwrap_err().starts_with("record 1: expected an object, found an array")
        );
    }
}
