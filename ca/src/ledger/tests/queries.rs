use chancery_proto::chancery::v1 as wire;

use super::*;

#[tokio::test]
async fn an_identity_is_shown_by_serial_and_by_entry() {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.append_all(vec![start("1"), issuance(7).into()]).await.unwrap();
    let identity = ledger.show(chancery_identity::Serial(serial(7).to_be_bytes())).await.unwrap().unwrap();
    assert_eq!(ledger.show_entry(1).await.unwrap().as_ref(), Some(&identity));
    assert_eq!(ledger.latest_for_pod("shop", "cart-7").await.unwrap().as_ref(), Some(&identity));
    assert_eq!(ledger.latest_for_pod("other", "cart-7").await.unwrap(), None);
    assert_eq!(ledger.show_entry(0).await.unwrap(), None);
    assert_eq!(ledger.show_entry(2).await.unwrap(), None);

    let wire = wire::Identity::from(identity);
    assert_eq!((wire.entry, wire.spiffe_id.as_str()), (1, "spiffe://example.org/ns/shop/sa/cart"));
    assert_eq!(wire.serial, format!("{:032x}", serial(7)));
    assert_eq!((wire.not_before_ms, wire.not_after_ms), (entry::to_millis(START), entry::to_millis(START) + 3_600_000));
    assert_eq!(wire.dns_names, ["cart.shop.svc"]);
    assert_eq!(wire.agent, format!("spiffe://example.org/chancery/agent/east/{}", uuid(100)));
}

#[tokio::test]
async fn a_page_token_of_another_filter_is_refused() {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.append_all((0..3).map(|number| issuance(number).into()).collect()).await.unwrap();
    let filter = IdentityFilter { namespace: Some("shop".into()), ..IdentityFilter::default() };
    let token = ledger.list(&filter, 1, None).await.unwrap().next.unwrap();
    assert_eq!(ledger.list(&filter, 1, Some(&token)).await.unwrap().identities[0].index, 1);
    for (filter, token) in [(&IdentityFilter::default(), token.as_str()), (&filter, "garbage"), (&filter, ""), (&filter, "AAAA")] {
        assert!(matches!(ledger.list(filter, 1, Some(token)).await, Err(LedgerError::PageToken(_))), "{token}");
    }
    for size in [0, MAX_PAGE_SIZE + 1] {
        assert!(matches!(ledger.list(&filter, size, None).await, Err(LedgerError::PageSize(_))));
    }
}

/// Every entry has the node's term, and only the oldest the root's: without its help the first page would give up on the way.
#[tokio::test]
async fn a_root_that_few_entries_have_is_found_beside_a_term_that_many_have() {
    let place = Place { segment_bytes: 16 << 20, ..Place::new() };
    let ledger = place.ledger().await;
    ledger.append(Issuance { root: [3; 16], ..issuance(1) }.into()).await.unwrap();
    for _ in 0..51 {
        ledger.append_all(vec![issuance(2).into(); 1000]).await.unwrap();
    }
    let of_node = wire::IdentityFilter { node: "node-1".into(), ..wire::IdentityFilter::default() };
    let filter = IdentityFilter::try_from(&wire::IdentityFilter { root: hex::encode([3; 16]), ..of_node }).unwrap();
    let page = ledger.list(&filter, 10, None).await.unwrap();
    assert_eq!(page.identities.iter().map(|identity| identity.index).collect::<Vec<_>>(), [0]);
    assert_eq!(page.next, None);
}

#[tokio::test]
async fn a_fingerprint_that_fits_more_than_one_certificate_is_refused() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let under = |last: u8| Issuance { root: [2, 2, 2, 2, last, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], ..issuance(last.into()) };
    ledger.append_all(vec![under(1).into(), under(2).into()]).await.unwrap();
    let filter =
        |root: &str| IdentityFilter::try_from(&wire::IdentityFilter { root: root.into(), ..wire::IdentityFilter::default() }).unwrap();
    let error = ledger.list(&filter("02020202"), 10, None).await.unwrap_err();
    assert!(matches!(&error, LedgerError::Ambiguous { field: "root", found, .. } if found.len() == 2), "{error}");
    let found = ledger.list(&filter("02:02:02:02:02"), 10, None).await.unwrap().identities;
    assert_eq!(found.iter().map(|identity| identity.index).collect::<Vec<_>>(), [1]);
    assert_eq!(ledger.list(&filter("03030303"), 10, None).await.unwrap(), Page::default());
}

/// Every entry has the node's term, and only the oldest has the trust state's namespace: the first page gives up on the way.
#[tokio::test]
async fn a_rare_match_is_found_on_a_later_page() {
    let place = Place { segment_bytes: 16 << 20, ..Place::new() };
    let ledger = place.ledger().await;
    let rare = certificate("spiffe://example.org/ns/rare/sa/cart", serial(1), START, Duration::from_secs(3600));
    ledger.append(Issuance { certificate: rare, ..issuance(1) }.into()).await.unwrap();
    for _ in 0..51 {
        ledger.append_all(vec![issuance(2).into(); 1000]).await.unwrap();
    }
    let prefix = Some("spiffe://example.org/ns/rare".into());
    let filter = IdentityFilter {
        node: Some(NodeFilter { cluster: None, name: "node-1".into() }),
        spiffe_id_prefix: prefix,
        ..IdentityFilter::default()
    };
    let first = ledger.list(&filter, 10, None).await.unwrap();
    assert!(first.identities.is_empty() && first.next.is_some());
    let second = ledger.list(&filter, 10, first.next.as_deref()).await.unwrap();
    assert_eq!(second.identities.iter().map(|identity| identity.index).collect::<Vec<_>>(), [0]);
    assert_eq!(second.next, None);
}

#[tokio::test]
async fn a_lifetime_that_was_allowed_once_counts_after_it_was_shortened_and_restarted() {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.allow_lifetime(Duration::from_secs(30 * 24 * 3600)).await.unwrap();
    let long = certificate("spiffe://example.org/ns/shop/sa/cart", serial(1), START, Duration::from_secs(30 * 24 * 3600));
    ledger.append(Issuance { certificate: long, ..issuance(1) }.into()).await.unwrap();
    ledger.close().await.unwrap();
    drop(ledger);
    place.clock.advance(Duration::from_secs(29 * 24 * 3600));
    let ledger = place.ledger().await;
    let unexpired = IdentityFilter { unexpired: true, ..IdentityFilter::default() };
    assert_eq!(ledger.list(&unexpired, 1, None).await.unwrap().identities.len(), 1);
    place.clock.advance(Duration::from_secs(2 * 24 * 3600));
    assert_eq!(ledger.list(&unexpired, 1, None).await.unwrap(), Page::default());
}

#[test]
fn a_filter_that_cannot_be_read_says_which_field() {
    let field = |filter: wire::IdentityFilter| IdentityFilter::try_from(&filter).unwrap_err().field;
    let filter = wire::IdentityFilter::default;
    assert_eq!(field(wire::IdentityFilter { spiffe_id: "https://example.org".into(), ..filter() }), "spiffe_id");
    assert_eq!(field(wire::IdentityFilter { spiffe_id_prefix: "example.org".into(), ..filter() }), "spiffe_id_prefix");
    assert_eq!(field(wire::IdentityFilter { serial: "12".into(), ..filter() }), "serial");
    assert_eq!(field(wire::IdentityFilter { pod: "a/b/c".into(), ..filter() }), "pod");
    assert_eq!(field(wire::IdentityFilter { service_account: "/a".into(), ..filter() }), "service_account");
    assert_eq!(field(wire::IdentityFilter { agent: "node-1".into(), ..filter() }), "agent");
    assert_eq!(field(wire::IdentityFilter { issuing_certificate: "010203".into(), ..filter() }), "issuing_certificate");
    assert_eq!(field(wire::IdentityFilter { root: "01020304g".into(), ..filter() }), "root");
    let colons = "01:00:00:00:00:00:00:00:00:00:00:00:00:00:00:07";
    let parsed = IdentityFilter::try_from(&wire::IdentityFilter { serial: colons.into(), ..filter() }).unwrap();
    assert_eq!(parsed.serial, Some(chancery_identity::Serial(serial(7).to_be_bytes())));
}

#[tokio::test]
async fn an_identity_stands_by_its_dates_its_successor_and_what_signed_it() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let own = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    };
    let (root, issuer) = (own("the root"), own("an issuer"));
    let half = |der: &[u8]| first_half(chancery_identity::Fingerprint::of(&rustls_pki_types::CertificateDer::from(der)).0);
    let under = |number| Issuance { root: half(&root), issuing_certificate: half(&issuer), ..issuance(number) };
    let another_pod = Issuance { pod_uid: Some(uuid(9)), ..under(2) };
    let own_svid = |number| Issuance { reason: entry::IssueReason::AgentRenewal, pod_uid: None, ..under(number) };
    let authority = |der: &[u8], root| Body::Authority(wire::AuthorityCertificate { certificate: der.to_vec(), root });
    let bodies = [authority(&root, true), authority(&issuer, false)].into_iter();
    let issuances = [under(1), another_pod, Issuance { pod_uid: Some(uuid(1)), ..under(3) }, issuance(4), own_svid(5), own_svid(6)];
    ledger.append_all(bodies.chain(issuances.map(Body::from)).collect()).await.unwrap();
    let standing = async |index| ledger.standing(&ledger.show_entry(index).await.unwrap().unwrap()).await.unwrap();

    let first = standing(2).await;
    assert_eq!(first.root.as_ref().map(|root| root.subject.as_str()), Some("the root"));
    assert_eq!(first.issuing_certificate.as_ref().map(|issuer| issuer.subject.as_str()), Some("an issuer"));
    assert_eq!((first.begun, first.expired, first.superseded_by), (true, false, Some(4)));
    assert_eq!((standing(3).await.superseded_by, standing(4).await.superseded_by), (None, None));
    assert_eq!((standing(5).await.root, standing(5).await.issuing_certificate), (None, None));
    assert_eq!((standing(6).await.superseded_by, standing(7).await.superseded_by), (Some(7), None));
    place.clock.set(START - Duration::from_secs(1));
    assert!(!standing(2).await.begun);
    let change = Change::Revoke { subject: Subject::Pod(uuid(1)), until: START + Duration::from_secs(3600) };
    let act = ledger.act("local:uid=0", change, "a test wants it").await.unwrap();
    assert_eq!(standing(2).await.revoked.map(|revocation| revocation.entry), Some(act));
    assert_eq!(standing(3).await.revoked, None);
    place.clock.set(START + Duration::from_secs(3601));
    assert!(standing(2).await.expired);
}
