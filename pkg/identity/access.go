package identity

import (
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// FeatureAccess has the registry take the types access and client.
const FeatureAccess = "access"

// AccessID is the id of the one entry of type access.
const AccessID = "access"

// AccessPolicy is the body of the access entry: who may read or ask what, and
// for which purposes. pkg/access decides by it.
//
// The registry checks its form and does not parse the Cedar text: validators of
// mixed versions would have to agree on a parser. Who proposes one compiles it,
// and a gateway that cannot compile it grants nothing.
type AccessPolicy struct {
	Version  string          `json:"version"`
	Purposes []AccessPurpose `json:"purposes"`
	// Cedar is the text of the policies.
	Cedar string `json:"cedar"`
}

// AccessPurpose is one of the reasons for which somebody may ask.
type AccessPurpose struct {
	// Code is lower-case letters, digits and dashes, at most 63.
	Code string `json:"code"`
	// Text is for people.
	Text string `json:"text"`
	// Case says that a case number must be given.
	Case bool `json:"case,omitempty"`
	// LegalBases, where given, are the codes of which one must be given.
	LegalBases []string `json:"legal_bases,omitempty"`
	// CovertDays is for how many days a reading may be left out of listings; 0 is
	// never.
	CovertDays int `json:"covert_days,omitempty"`
}

// maxCovertDays bounds how long a reading may be left out of listings.
const maxCovertDays = 366

// maxCedar bounds the text of the policies, bytes.
const maxCedar = 128 << 10

func (p *AccessPolicy) check(id string) error {
	switch {
	case id != AccessID:
		return kind.Errorf(kind.Invalid, "id: %.40q: the one access entry is %q", id, AccessID)
	case p.Version == "" || len(p.Version) > 63:
		return kind.Errorf(kind.Invalid, "body.version: 1 to 63 bytes")
	case p.Cedar == "" || len(p.Cedar) > maxCedar || !utf8.ValidString(p.Cedar):
		return kind.Errorf(kind.Invalid, "body.cedar: 1 to %d bytes of UTF-8", maxCedar)
	case len(p.Purposes) == 0 || len(p.Purposes) > 256:
		return kind.Errorf(kind.Invalid, "body.purposes: 1 to 256 are needed")
	}
	for i, u := range p.Purposes {
		if !code(u.Code) {
			return kind.Errorf(kind.Invalid, "body.purposes[%d].code: %.40q: lower-case letters, digits and dashes, 1 to 63", i, u.Code)
		}
		if slices.ContainsFunc(p.Purposes[:i], func(o AccessPurpose) bool { return o.Code == u.Code }) {
			return kind.Errorf(kind.Invalid, "body.purposes[%d].code: %q is there twice", i, u.Code)
		}
		if u.Text == "" || len(u.Text) > 500 {
			return kind.Errorf(kind.Invalid, "body.purposes[%d].text: 1 to 500 bytes", i)
		}
		for k, b := range u.LegalBases {
			if !code(b) {
				return kind.Errorf(kind.Invalid, "body.purposes[%d].legal_bases[%d]: %.40q: lower-case letters, digits and dashes, 1 to 63", i, k, b)
			}
		}
		if u.CovertDays < 0 || u.CovertDays > maxCovertDays {
			return kind.Errorf(kind.Invalid, "body.purposes[%d].covert_days: %d: 0 to %d", i, u.CovertDays, maxCovertDays)
		}
	}
	return nil
}

// code reports whether s can be a code in a list.
func code(s string) bool {
	return s != "" && len(s) <= 63 && !strings.ContainsFunc(s, func(c rune) bool {
		return c != '-' && (c < 'a' || c > 'z') && (c < '0' || c > '9')
	})
}

// Client is the body of a client's entry: somebody, or a program, who acts for
// an agency at the gateway, how they are known there, and until when.
type Client struct {
	// Agency is the id of an agency in the registry.
	Agency string `json:"agency"`
	// Certificate is the SHA-256 of the public key (SubjectPublicKeyInfo) of a TLS
	// client certificate, hex. Issuer and Subject are those of OIDC tokens. TokenKey
	// signs the client's own short-lived tokens. One of the three must be given.
	Certificate string    `json:"certificate,omitempty"`
	Issuer      string    `json:"issuer,omitempty"`
	Subject     string    `json:"subject,omitempty"`
	TokenKey    PublicKey `json:"token_key,omitempty"`
	// Roles, for instance dispatcher, operator, investigator, auditor.
	Roles []string `json:"roles"`
	// Until is when all this ends, RFC 3339 in UTC.
	Until string `json:"until"`
}

// Expires returns when the client's roles end.
func (c *Client) Expires() time.Time {
	t, err := time.Parse(time.RFC3339, c.Until)
	if err != nil {
		return time.Time{} // ended long ago; check lets no such entry in
	}
	return t
}

func (c *Client) check() error {
	if b, err := hex.DecodeString(c.Certificate); c.Certificate != "" && (err != nil || len(b) != 32 || strings.ToLower(c.Certificate) != c.Certificate) {
		return kind.Errorf(kind.Invalid, "body.certificate: must be 64 lower-case hex digits")
	}
	if (c.Issuer == "") != (c.Subject == "") {
		return kind.Errorf(kind.Invalid, "body: issuer and subject belong together")
	}
	if c.Certificate == "" && c.Issuer == "" && len(c.TokenKey) == 0 {
		return kind.Errorf(kind.Invalid, "body: one of certificate, issuer with subject, token_key is needed")
	}
	if len(c.Issuer) > 255 || len(c.Subject) > 127 {
		return kind.Errorf(kind.Invalid, "body: issuer has at most 255 bytes, subject 127")
	}
	if len(c.TokenKey) != 0 && (len(c.TokenKey) != 32 || !strongKey([]byte(c.TokenKey))) {
		return kind.Errorf(kind.Invalid, "body.token_key: is no Ed25519 public key of prime order")
	}
	if len(c.Roles) == 0 || len(c.Roles) > 32 {
		return kind.Errorf(kind.Invalid, "body.roles: 1 to 32 are needed")
	}
	for i, r := range c.Roles {
		if !code(r) {
			return kind.Errorf(kind.Invalid, "body.roles[%d]: %.40q: lower-case letters, digits and dashes, 1 to 63", i, r)
		}
	}
	if t, err := time.Parse(time.RFC3339, c.Until); err != nil || t.Location() != time.UTC {
		return kind.Errorf(kind.Invalid, "body.until: %.40q: must be a time in UTC, such as 2027-01-31T00:00:00Z", c.Until)
	}
	return nil
}

// putAccess checks an access policy or a client.
func (r *Registry) putAccess(height uint64, t EntryType, id string, body json.RawMessage) error {
	if height != 0 && !r.loading && !r.Active(FeatureAccess, height) {
		return kind.Errorf(kind.Invalid, "type: %s: the feature %q is not in force", t, FeatureAccess)
	}
	if t == TypeAccess {
		var p AccessPolicy
		if err := parseBody(body, &p); err != nil {
			return err
		}
		return p.check(id)
	}
	if t == TypeFleet {
		return r.checkFleet(id, body)
	}
	var c Client
	if err := parseBody(body, &c); err != nil {
		return err
	}
	if err := c.check(); err != nil {
		return err
	}
	if e, ok := r.entries[entryKey(TypeAgency, c.Agency)]; !ok || e.Status == Revoked && !r.loading {
		return kind.Errorf(kind.Invalid, "body.agency: %.40q is no agency in force", c.Agency)
	}
	return nil
}

// Access returns the access policy in force, false where there is none.
func (r *Registry) Access() (AccessPolicy, bool) {
	e, ok := r.entries[entryKey(TypeAccess, AccessID)]
	if !ok || e.Status != Active {
		return AccessPolicy{}, false
	}
	var p AccessPolicy
	return p, parseBody(e.Body, &p) == nil
}

// Clients returns the clients in force of agencies in force, by id. Whether
// their time has come is for whoever has a clock.
func (r *Registry) Clients() map[string]Client {
	out := map[string]Client{}
	for _, e := range r.entries {
		if e.Type != TypeClient || e.Status != Active {
			continue
		}
		var c Client
		if parseBody(e.Body, &c) != nil {
			continue // unreachable: it was checked when it was filed
		}
		if a, ok := r.entries[entryKey(TypeAgency, c.Agency)]; ok && a.Status == Active {
			out[e.ID] = c
		}
	}
	return out
}
