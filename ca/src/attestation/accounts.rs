//! Which service accounts a rule speaks of.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Service accounts: `*` (all), `shop/*` or `shop` (all of a namespace), `shop/cart` (one).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AccountPattern {
    namespace: Option<String>,
    service_account: Option<String>,
}

/// One service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccountName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Not a pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no service accounts; write `*`, `namespace/*` or `namespace/name`, in Kubernetes' characters (a-z, 0-9, `-`, `.`)")]
pub struct PatternError(String);

impl AccountPattern {
    /// Whether it speaks of this account.
    pub fn matches(&self, namespace: &str, service_account: &str) -> bool {
        self.namespace.as_deref().is_none_or(|own| own == namespace)
            && self.service_account.as_deref().is_none_or(|own| own == service_account)
    }

    /// Whether there is an account that both speak of.
    pub fn overlaps(&self, other: &Self) -> bool {
        fn meet(one: Option<&str>, other: Option<&str>) -> bool {
            one.zip(other).is_none_or(|(one, other)| one == other)
        }
        meet(self.namespace.as_deref(), other.namespace.as_deref())
            && meet(self.service_account.as_deref(), other.service_account.as_deref())
    }

    /// Whether it speaks of exactly one account.
    pub fn is_exact(&self) -> bool {
        self.service_account.is_some()
    }

    /// The one account that it speaks of.
    pub fn exact(&self) -> Option<AccountName> {
        Some(AccountName { namespace: self.namespace.clone()?, name: self.service_account.clone()? })
    }
}

impl FromStr for AccountPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, service_account) = match text.split_once('/') {
            None if text == "*" => return Ok(Self { namespace: None, service_account: None }),
            None => (text, None),
            Some((namespace, "*")) => (namespace, None),
            Some((namespace, name)) => (namespace, Some(name)),
        };
        let fits = |name: &str| {
            !name.is_empty() && name.len() <= 253 && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
        };
        if !fits(namespace) || service_account.is_some_and(|name| !fits(name)) {
            return Err(PatternError(text.to_owned()));
        }
        Ok(Self { namespace: Some(namespace.to_owned()), service_account: service_account.map(str::to_owned) })
    }
}

impl fmt::Display for AccountPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.namespace, &self.service_account) {
            (None, _) => f.write_str("*"),
            (Some(namespace), None) => write!(f, "{namespace}/*"),
            (Some(namespace), Some(name)) => write!(f, "{namespace}/{name}"),
        }
    }
}

impl Serialize for AccountPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AccountPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> AccountPattern {
        text.parse().unwrap()
    }

    #[test]
    fn a_pattern_matches_what_it_says() {
        assert!(pattern("*").matches("shop", "cart"));
        assert!(pattern("shop").matches("shop", "cart"));
        assert!(pattern("shop/*").matches("shop", "cart"));
        assert!(!pattern("shop/*").matches("shop2", "cart"));
        assert!(pattern("shop/cart").matches("shop", "cart"));
        assert!(!pattern("shop/cart").matches("shop", "checkout"));
    }

    #[test]
    fn patterns_that_share_an_account_overlap() {
        for (one, other, expected) in [
            ("*", "shop/cart", true),
            ("shop/*", "shop/cart", true),
            ("shop/cart", "shop/cart", true),
            ("shop/*", "bank/*", false),
            ("shop/cart", "shop/checkout", false),
        ] {
            assert_eq!(pattern(one).overlaps(&pattern(other)), expected, "{one} {other}");
            assert_eq!(pattern(other).overlaps(&pattern(one)), expected, "{other} {one}");
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for text in ["", "/", "*/cart", "shop/", "/cart", "a/b/c", "Shop/cart", "shop/ca*"] {
            assert!(text.parse::<AccountPattern>().is_err(), "{text:?}");
        }
    }
}
