//! How the clusters stand whose tokens count: their keys, the watch of their pods, and the copies of the trust bundle in them.

use std::collections::BTreeMap;

use chancery_process::moment::moment;
use time::OffsetDateTime;

use crate::attestation::{Away, ClusterStatus, LiveStatus, Standing};
use crate::publication::CopyStatus;
use crate::server::problem::Problem;
use crate::telemetry::Reading;

const UNHEARD: &str = "For how long nothing was heard from the cluster's API server; 0 while it is heard";

const SEE_SOURCE: &str = "see whether what is named there is there, and the CA may read it; the CA tries again by itself";
const ASK_API_SERVER: &str =
    "see whether the API server answers, and the CA may ask it (`kubectl auth can-i`); the CA tries again by itself";

/// What keeps the CA from issuing to somebody.
pub(super) fn obstacles(clusters: &[ClusterStatus]) -> Vec<Problem> {
    let mut obstacles = Vec::new();
    for ClusterStatus { name, keys, error, live, .. } in clusters {
        if *keys == 0 {
            let problem = error.as_deref().unwrap_or("they have not been fetched yet");
            obstacles.push(Problem::new(format!("the public keys of cluster {name} are not loaded: {problem}"), SEE_SOURCE));
        }
        if let Some(LiveStatus { standing: Standing::Syncing { problem }, .. }) = live {
            let problem = problem.as_deref().unwrap_or("they are being listed");
            obstacles.push(Problem::new(format!("the pods of cluster {name} are not known yet: {problem}"), ASK_API_SERVER));
        }
    }
    obstacles
}

/// What somebody should look at although it issues.
pub(super) fn flaws(clusters: &[ClusterStatus], copies: &[CopyStatus]) -> Vec<Problem> {
    let mut flaws = Vec::new();
    for ClusterStatus { name, keys, error, live, .. } in clusters {
        if let Some(error) = error.as_ref().filter(|_| *keys > 0) {
            let text = format!("the public keys of cluster {name} could not be loaded again, the last ones stay: {error}");
            flaws.push(Problem::new(text, SEE_SOURCE));
        }
        let unheard = match live.as_ref().map(|live| &live.standing) {
            Some(Standing::Stale(away)) => Some((away, "", "pods that are known keep")),
            Some(Standing::Unheard(away)) => Some((away, ", the start of the CA", "pods that have a certificate keep")),
            Some(Standing::Synced | Standing::Syncing { .. }) | None => None,
        };
        if let Some((Away { since, problem }, start, who)) = unheard {
            let since = moment(*since);
            // Without keys nobody gets any: that is told by itself.
            let what = if *keys > 0 { format!("{who} getting certificates, new ones wait ({problem})") } else { problem.clone() };
            let text = format!("the API server of cluster {name} has not been heard since {since}{start}: {what}");
            flaws.push(Problem::new(text, ASK_API_SERVER));
        }
    }
    for CopyStatus { cluster, copy, failure, .. } in copies {
        if let Some((since, problem)) = failure {
            let text = format!("the {copy} of cluster {cluster} could not be written since {}: {problem}", moment(*since));
            flaws.push(Problem::new(text, ASK_API_SERVER));
        }
    }
    flaws
}

/// The gauges.
pub(super) fn readings(clusters: &[ClusterStatus], copies: &[CopyStatus], now: OffsetDateTime) -> Vec<Reading> {
    let of_live = |read: &dyn Fn(&LiveStatus) -> f64| {
        clusters.iter().filter_map(|cluster| Some((cluster.name.clone(), read(cluster.live.as_ref()?)))).collect()
    };
    let keys = clusters.iter().map(|cluster| (cluster.name.clone(), number(cluster.keys as u64))).collect();
    let unheard = |live: &LiveStatus| match &live.standing {
        Standing::Synced => 0.0,
        Standing::Stale(away) => (now - away.since).as_seconds_f64(),
        // Nothing was ever heard in full.
        Standing::Unheard(_) | Standing::Syncing { .. } => f64::INFINITY,
    };
    let mut behind: BTreeMap<String, u64> = BTreeMap::new();
    for copy in copies {
        *behind.entry(copy.cluster.clone()).or_default() += u64::from(!copy.is_current);
    }
    vec![
        Reading::each("chancery_cluster_keys", "Public keys loaded", "cluster", keys),
        Reading::each("chancery_cluster_pods", "Pods known by watching the cluster", "cluster", of_live(&|live| number(live.pods as u64))),
        Reading::each(
            "chancery_cluster_service_accounts",
            "Service accounts known by watching the cluster",
            "cluster",
            of_live(&|live| number(live.service_accounts as u64)),
        ),
        Reading::each("chancery_cluster_unheard_seconds", UNHEARD, "cluster", of_live(&unheard)),
        Reading::each(
            "chancery_cluster_reviews_accepted",
            "Tokens that the cluster's API server was asked about and bore out, since the start",
            "cluster",
            of_live(&|live| number(live.reviews.accepted)),
        ),
        Reading::each(
            "chancery_cluster_reviews_refused",
            "Tokens that it was asked about and did not bear out, since the start",
            "cluster",
            of_live(&|live| number(live.reviews.refused)),
        ),
        Reading::each(
            "chancery_cluster_reviews_failed",
            "Tokens that it was asked about without an answer, since the start",
            "cluster",
            of_live(&|live| number(live.reviews.failed)),
        ),
        Reading::each(
            "chancery_cluster_api_calls",
            "Calls to the cluster's API server since the start, watches included",
            "cluster",
            of_live(&|live| number(live.calls)),
        ),
        Reading::each(
            "chancery_cluster_trust_copies_behind",
            "Copies of the trust bundle in the cluster that do not hold the newest",
            "cluster",
            behind.into_iter().map(|(cluster, copies)| (cluster, number(copies))).collect(),
        ),
    ]
}

/// Counts are exact up to 2^53, far beyond any of these.
#[allow(clippy::cast_precision_loss)]
fn number(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attestation::ReviewCounts;
    use crate::kubernetes::TrustCopy;
    use crate::server::problem::texts;
    use crate::telemetry::Values;

    const NOW: OffsetDateTime = time::macros::datetime!(2027-01-15 08:00 UTC);

    fn cluster(standing: Standing) -> ClusterStatus {
        let reviews = ReviewCounts { accepted: 1, refused: 2, failed: 3 };
        let live = LiveStatus { standing, pods: 100, service_accounts: 10, reviews, calls: 7 };
        ClusterStatus { name: "east".into(), keys: 2, error: None, loaded_at: None, live: Some(live) }
    }

    fn stale() -> Standing {
        Standing::Stale(Away { since: NOW - time::Duration::MINUTE, problem: "refused".into() })
    }

    #[test]
    fn a_cluster_whose_pods_are_not_known_yet_is_named_and_in_the_way() {
        let listing = [cluster(Standing::Syncing { problem: None })];
        assert_eq!(texts(obstacles(&listing)), ["the pods of cluster east are not known yet: they are being listed"]);
        let denied = [cluster(Standing::Syncing { problem: Some("denied".into()) })];
        assert_eq!(texts(obstacles(&denied)), ["the pods of cluster east are not known yet: denied"]);
        assert!(flaws(&listing, &[]).is_empty());
    }

    #[test]
    fn a_cluster_whose_api_server_is_away_is_a_flaw_and_no_obstacle() {
        let Standing::Stale(away) = stale() else { panic!("it is away") };
        for standing in [stale(), Standing::Unheard(away)] {
            assert!(obstacles(&[cluster(standing.clone())]).is_empty());
            let flaws = flaws(&[cluster(standing)], &[]);
            assert!(flaws.len() == 1 && ["east", "07:59:00Z", "refused"].iter().all(|words| flaws[0].text.contains(words)), "{flaws:?}");
        }
    }

    #[test]
    fn a_cluster_that_is_heard_is_neither() {
        let synced = [cluster(Standing::Synced)];
        assert!(obstacles(&synced).is_empty() && flaws(&synced, &[]).is_empty());
    }

    #[test]
    fn a_copy_of_the_bundle_that_cannot_be_written_is_a_flaw_and_counted() {
        let copy = |is_current: bool| CopyStatus {
            cluster: "east".into(),
            copy: TrustCopy::ConfigMap { namespace: "shop".into() },
            is_current,
            failure: (!is_current).then(|| (NOW, "denied".to_owned())),
        };
        let copies = [copy(true), copy(false)];
        let flaws = flaws(&[], &copies);
        assert!(flaws.len() == 1 && flaws[0].text.contains("ConfigMap shop/chancery-trust-bundle of cluster east"), "{flaws:?}");
        let behind = readings(&[], &copies, NOW).pop().unwrap();
        assert_eq!(behind.values, Values::Each("cluster", vec![("east".to_owned(), 1.0)]));
    }

    #[test]
    fn how_long_nothing_was_heard_is_measured() {
        let of = |standing| {
            let readings = readings(&[cluster(standing)], &[], NOW);
            let reading = readings.into_iter().find(|reading| reading.name == "chancery_cluster_unheard_seconds").unwrap();
            let Values::Each(_, values) = reading.values else { panic!("one for each cluster") };
            values[0].1
        };
        assert_eq!([of(Standing::Synced), of(stale())].map(|seconds| seconds.to_string()), ["0", "60"]);
        assert!(of(Standing::Syncing { problem: None }).is_infinite());
    }

    #[test]
    fn a_cluster_whose_api_server_is_not_watched_has_no_gauges_of_a_watch() {
        let offline = ClusterStatus { live: None, ..cluster(Standing::Synced) };
        let readings = readings(&[offline], &[], NOW);
        let counts: Vec<_> = readings.iter().map(|reading| matches!(&reading.values, Values::Each(_, of) if of.len() == 1)).collect();
        assert_eq!(counts, [true, false, false, false, false, false, false, false, false]);
    }
}
