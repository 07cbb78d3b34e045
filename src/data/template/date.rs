//! The day that a template may ask for, pinned by `--template-date`: rows never depend on the clock.

use crate::bail;
use crate::error::{Error, Result};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A day of the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    year: u32,
    month: u32,
    day: u32,
}

impl Date {
    /// Reads `YYYY-MM-DD`.
    ///
    /// # Errors
    /// A usage error if it is no such day.
    pub fn parse(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let number = |i: usize, digits: usize| {
            let part = parts.get(i).filter(|p| p.len() == digits && p.bytes().all(|b| b.is_ascii_digit()))?;
            part.parse::<u32>().ok()
        };
        if let (3, Some(year), Some(month), Some(day)) = (parts.len(), number(0, 4), number(1, 2), number(2, 2))
            && (1..=12).contains(&month)
            && year > 0
            && (1..=days_in(year, month)).contains(&day)
        {
            return Ok(Self { year, month, day });
        }
        Err(Error::usage(format!("template_date: expected a day such as 2024-07-26, found {text:?}")))
    }

    /// Midnight of the day, written as C's `strftime` does in English.
    ///
    /// # Errors
    /// If the format asks for something else.
    pub fn format(self, format: &str) -> Result<String> {
        let Self { year, month, day } = self;
        let of_year: u32 = (1..month).map(|m| days_in(year, m)).sum::<u32>() + day;
        // The first of January of the year 1 was a Monday.
        let before = year - 1;
        let weekday = (before * 365 + before / 4 - before / 100 + before / 400 + of_year) as usize % 7;
        let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[weekday]);
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let (bare, what) = match chars.next() {
                Some('-') => (true, chars.next()),
                other => (false, other),
            };
            let number = |n: u32, width: usize| if bare { n.to_string() } else { format!("{n:0width$}") };
            out += &match what {
                Some('Y') => number(year, 4),
                Some('y') => number(year % 100, 2),
                Some('m') => number(month, 2),
                Some('d') => number(day, 2),
                Some('e') => {
                    if bare {
                        day.to_string()
                    } else {
                        format!("{day:2}")
                    }
                }
                Some('j') => number(of_year, 3),
                Some('H' | 'M' | 'S') => number(0, 2),
                Some('I') => number(12, 2),
                Some('p') => "AM".to_string(),
                Some('B') => month_name.to_string(),
                Some('b' | 'h') => month_name[..3].to_string(),
                Some('A') => day_name.to_string(),
                Some('a') => day_name[..3].to_string(),
                Some('F') => format!("{year:04}-{month:02}-{day:02}"),
                Some('T') => "00:00:00".to_string(),
                Some('%') => "%".to_string(),
                other => {
                    bail!("strftime_now: %{} in {format:?} is not supported", other.map_or(String::new(), String::from))
                }
            };
        }
        Ok(out)
    }
}

fn days_in(year: u32, month: u32) -> u32 {
    match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected texts are those of Python 3.11's `datetime.strftime`.
    #[test]
    fn days_are_written_as_strftime_writes_them() {
        let date = |text: &str, format: &str| Date::parse(text).unwrap().format(format).unwrap();
        assert_eq!(date("2024-07-26", "%d %b %Y"), "26 Jul 2024");
        assert_eq!(date("2024-12-31", "%A, %B %-d, %y; day %j"), "Tuesday, December 31, 24; day 366");
        assert_eq!(date("2000-02-29", "%a %e %F %H:%M 100%%"), "Tue 29 2000-02-29 00:00 100%");
        assert_eq!(date("1970-01-01", "%a %-m %e|"), "Thu 1  1|");
        assert!(Date::parse("2024-07-26").unwrap().format("%Q").unwrap_err().to_string().contains("%Q"));
        for wrong in ["2023-02-29", "2024-13-01", "26 Jul 2024", "2024-7-26", "0000-01-01", "2024-07-26-1", ""] {
            assert_eq!(Date::parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }
}
